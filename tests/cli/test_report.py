"""``lightning-qat report``: the page of an export folder, made later."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_qat.convert.convert import convert
from lightning_qat.export.delivery.export_all import export_all
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.cli.conftest import Command
from tests.models import linear, trained


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder as an export leaves it, without a page."""
    x = torch.randn(16, 6)
    quantized = convert(trained(linear(), x), x)
    quantized.save(tmp_path / "net.pt2")
    export_all(quantized, [FakeQuantOnnxExporter()], tmp_path, "net")
    return tmp_path


def test_the_page_is_made_from_the_folder_alone(command: Command, results: Path) -> None:
    code, out, err = command("report", results)
    assert (code, out) == (0, f"report: {results / 'report.html'}\n"), err
    html = (results / "report.html").read_text("utf-8")
    assert "<h1>net</h1>" in html
    assert "Activations are those of the model&#39;s example inputs." in html


def test_samples_are_given_by_the_inputs_names(command: Command, results: Path) -> None:
    np.savez(results / "real.npz", input=np.ones((3, 6), np.float32))
    assert command("report", results, "--inputs", results / "real.npz").code == 0
    html = (results / "report.html").read_text("utf-8")
    assert "on 3 samples" in html
    assert "example inputs" not in html.partition('<section id="layers"')[0]
    np.savez(results / "wrong.npz", x=np.ones((3, 6), np.float32))
    code, _, err = command("report", results, "--inputs", results / "wrong.npz")
    assert code == 2
    assert "it holds 'x'" in err


def test_a_renamed_file_is_named_and_the_rest_is_shown(command: Command, results: Path) -> None:
    (results / "net_qdq.onnx").rename(results / "other.onnx")
    done = command("report", results, "--json")
    assert done.code == 1
    assert done.json["files"] == ["fake_quant_onnx: net_qdq.onnx is missing"]
    assert "is missing" in Path(done.json["report"]).read_text("utf-8")


def test_a_renamed_model_is_given_by_option(command: Command, results: Path) -> None:
    elsewhere = results / "elsewhere"
    elsewhere.mkdir()
    (results / "net.pt2").rename(elsewhere / "trained.pt2")
    code, out, err = command("report", results)
    assert (code, out) == (2, "")
    assert "the folder holds none" in err
    assert "--model" in err
    assert command("report", results, "--model", elsewhere / "trained.pt2").code == 0


def test_a_folder_without_an_export_is_one_message(command: Command, tmp_path: Path) -> None:
    code, out, err = command("report", tmp_path / "no")
    assert (code, out) == (2, "")
    assert "There must be a manifest.json in" in err
    assert "Traceback" not in err


def test_an_export_writes_the_page_and_says_so(command: Command, results: Path) -> None:
    out = results / "again"
    done = command("export", results / "net.pt2", "--to", "fake_quant_onnx", "--out", out)
    assert done.code == 0
    assert done.out.endswith(f"report: {out / 'report.html'}\n")
    assert (out / "report.html").is_file()


def test_an_export_outlives_a_page_that_fails(
    command: Command, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no room for a plan")

    monkeypatch.setattr("lightning_qat.report.collect.plan_of", broken)
    out = results / "again"
    done = command("export", results / "net.pt2", "--to", "fake_quant_onnx", "--out", out)
    assert done.code == 0
    assert "RuntimeError: no room for a plan" in done.err
    assert f"lightning-qat report {out}" in done.err
    assert (out / "manifest.json").is_file()
