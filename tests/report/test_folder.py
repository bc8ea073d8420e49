"""A folder that lacks what a report is made of says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_qat.convert.convert import convert
from lightning_qat.report.folder import find_model, read_manifest, require_model_of
from lightning_qat.report.page import report_or_reason
from tests.models import linear, trained
from tests.report.conftest import Exported


def test_a_folder_without_a_manifest_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"must be a manifest\.json .* lightning-qat export"
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"targets": 1}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": {"a": 1}}, r"\['targets'\]\['a'\] must be a mapping; got 1"),
        ({"targets": {"a": {"notes": "x"}}}, r"\['a'\]\['notes'\] must be a list; got 'x'"),
        ({"targets": {"a": {"error": None}}}, r"\['error'\] must be a text; got None"),
        ({"targets": {"a": {"files": {"m": {}}}}}, r"\['m'\] must have the key 'path'"),
        ({"targets": {"a": {"agreement": {"runtimes": [1]}}}}, r"\['runtimes'\]\[0\] must be"),
        ({"training": {"loss": [[1]]}}, r"\['loss'\]\[0\] must be a list of 2; got \[1\]"),
        ({"inputs": "x"}, r"\['inputs'\] must be a list"),
        ({"recipe": None}, r"\['recipe'\] must be a mapping"),
    ],
)
def test_what_no_export_writes_is_named_with_its_place(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"targets": {}, **change}))
    with pytest.raises(ValueError, match=rf"manifest\.json' is damaged: .*{message}.*Export again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/hosts", "a/../../b", "C:x", "a\\b", "", "a\0", "x" * 300]
)
def test_a_manifest_reads_no_file_outside_of_its_folder(tmp_path: Path, path: str) -> None:
    files = {"model": {"path": path, "bytes": 1, "sha256": ""}}
    (tmp_path / "manifest.json").write_text(json.dumps({"targets": {"a": {"files": files}}}))
    with pytest.raises(ValueError, match=r"files must be in the manifest's folder; it names \["):
        read_manifest(tmp_path)


def _manifest(*files: str) -> dict[str, object]:
    listed = {str(n): {"path": file} for n, file in enumerate(files)}
    return {"targets": {"one": {"files": listed}, "failed": {"error": "no"}}}


def test_the_model_is_found_by_the_files_names(tmp_path: Path) -> None:
    for name in ("net.pt2", "net_large.pt2", "other.pt2"):
        (tmp_path / name).touch()
    assert find_model(tmp_path, _manifest("net_large_qdq.onnx")).name == "net_large.pt2"
    assert find_model(tmp_path, _manifest("net_qdq.onnx")).name == "net.pt2"
    with pytest.raises(FileNotFoundError, match=r"net.pt2, net_large.pt2, other.pt2.*--model"):
        find_model(tmp_path, _manifest("x.onnx"))


def test_a_renamed_model_is_found_where_it_is_the_only_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds none.*--model net\.pt2"):
        find_model(tmp_path, _manifest("net.onnx"))
    (tmp_path / "renamed.pt2").touch()
    assert find_model(tmp_path, _manifest("net.onnx")).name == "renamed.pt2"


def test_another_models_manifest_is_refused(exported: Exported, tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    other = convert(trained(linear(), x), x)
    with pytest.raises(ValueError, match=r"inputs and outputs \['input'\].*they have \['x'\]"):
        require_model_of(read_manifest(exported.folder), other, tmp_path / "other.pt2")


def test_a_failing_report_is_a_sentence_with_the_command_for_later(
    exported: Exported, tmp_path: Path
) -> None:
    reason = report_or_reason(tmp_path, exported.model)
    assert reason is not None
    assert reason.startswith("report.html is not written: FileNotFoundError: ")
    assert reason.endswith(f"To make it later: lightning-qat report {tmp_path}")
    assert not (tmp_path / "report.html").exists()


def test_nothing_but_the_page_is_written(exported: Exported, tmp_path: Path) -> None:
    for file in exported.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = {file.name for file in tmp_path.iterdir()}
    manifest = json.loads((tmp_path / "manifest.json").read_text("utf-8"))
    assert report_or_reason(tmp_path, exported.model, name="net") is None
    assert {file.name for file in tmp_path.iterdir()} == before | {"report.html"}
    assert read_manifest(tmp_path) == manifest
