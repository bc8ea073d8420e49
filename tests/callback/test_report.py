"""The page that a run leaves beside its manifest."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch import nn

from tests.callback.tiny import Net, loader, qat

QUIET: dict[str, Any] = {
    **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
    **{"enable_progress_bar": False, "enable_model_summary": False},
}


class Scaled(Net):
    """With a layer that has no quantized form, unused by the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(2, 2, 2)


def fit(folder: Path, **options: Any) -> Net:
    module = Scaled()
    callback = qat(exporters=["fake_quant_onnx"], export_dir=folder, **options)
    L.Trainer(max_epochs=2, callbacks=[callback], **QUIET).fit(module, loader())
    return module


def test_a_run_leaves_a_page_with_its_phases_losses_and_reasons(tmp_path: Path) -> None:
    module = fit(tmp_path)
    training = json.loads((tmp_path / "manifest.json").read_text("utf-8"))["training"]
    # Two batches calibrate; the others are quantized.
    assert training["phases"] == [[0, "calibrate"], [2, "quantize"]]
    assert [step for step, _ in training["loss"]] == [*range(1, 9)]
    assert [loss for _, loss in training["loss"]] == pytest.approx(module.losses)
    assert training["weight_sqnr_db"].keys() == {"conv.weight", "head.weight"}
    assert [name for name, _, _ in training["left_float"]] == ["bilinear"]
    html = (tmp_path / "report.html").read_text("utf-8")
    assert "<h1>scaled</h1>" in html
    assert 'id="training"' in html
    assert "inputs of the first training batch" in html
    assert "example inputs" not in html


def test_a_page_that_fails_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no room for a plan")

    monkeypatch.setattr("lightning_qat.report.collect.plan_of", broken)
    with pytest.warns(UserWarning, match=r"no room for a plan.*lightning-qat report") as warned:
        fit(tmp_path)
    # Lightning has warnings of its own.
    assert len([w for w in warned if str(w.message).startswith("QAT: ")]) == 1
    assert (tmp_path / "manifest.json").is_file()
    assert not (tmp_path / "report.html").exists()


def test_what_a_run_cannot_tell_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no weights")

    monkeypatch.setattr("lightning_qat.report.run_record.weight_rows", broken)
    with pytest.warns(UserWarning, match=r"nothing of the training: RuntimeError: no weights"):
        fit(tmp_path)
    assert 'id="training"' not in (tmp_path / "report.html").read_text("utf-8")


def test_without_verification_nothing_is_run_for_the_page(tmp_path: Path) -> None:
    fit(tmp_path, verify=False)
    html = (tmp_path / "report.html").read_text("utf-8")
    assert "not compared" in html
    assert "Layer by layer" not in html
