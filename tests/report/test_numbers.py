"""The numbers on the page are those of the converted model, of its files and of the manifest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.delivery.export_all import export_all
from lightning_qat.numerics.multiplications import multiplications
from lightning_qat.report.collect import collect
from lightning_qat.report.data import ReportData
from lightning_qat.report.folder import read_manifest
from lightning_qat.report.page import number, render, write_report
from tests.models import linear, trained
from tests.report.conftest import Exported
from tests.report.parsed import Parsed


@pytest.fixture(scope="module")
def data(exported: Exported) -> ReportData:
    return collect(exported.model, read_manifest(exported.folder), exported.folder, "net")


@pytest.fixture(scope="module")
def page(data: ReportData) -> Parsed:
    return Parsed(render(data))


def test_every_layer_has_a_row_with_the_models_numbers(exported: Exported, page: Parsed) -> None:
    rows = page.rows("Layer", "Weight scale")
    assert [row["Layer"] for row in rows] == ["conv1", "conv2", "head"]
    for row, layer in zip(rows, exported.model.layers, strict=True):
        source = exported.model.tensors[layer.input_key].qparams
        weight = exported.model.tensors[layer.weight_key]
        assert row["Scale"] == number(float(source.scale))
        assert row["Zero point"] == str(int(source.zero_point))
        low = float(source.scale) * (-128 - int(source.zero_point))
        assert row["Range"].split(" … ")[0] == number(low)
        assert (row["Weight bits"], row["Input bits"]) == ("4", "8")
        scale = weight.qparams.scale
        assert row["Weight scale"] == (
            f"{number(float(scale.min()))} – {number(float(scale.max()))} {scale.numel()} channels"
        )
    assert [row["Kind"] for row in rows] == ["Conv2d", "Conv2d", "Linear"]
    # 144 and 12 weights: four bytes in float, half a byte in four bits.
    assert [(row["Float size"], row["Size"]) for row in rows] == [
        *(("576 B", "72 B"), ("576 B", "72 B"), ("48 B", "6 B"))
    ]
    # A sample: 36 places times 144 weights; every weight of a Linear once.
    assert [row["Multiplications"] for row in rows] == ["5.18 k", "5.18 k", "12"]
    assert [row["Weight SQNR, dB"] for row in rows] == ["20.2", "–", "–"]


def test_every_quantized_tensor_has_a_row(exported: Exported, page: Parsed) -> None:
    rows = page.rows("Tensor", "Scheme")
    assert [row["Tensor"] for row in rows] == [call.name for call in exported.model.calls]
    for row in rows:
        qparams = exported.model.tensors[row["Tensor"]].qparams
        symmetric = int(qparams.zero_point) == 0
        assert row["Scheme"] == ("symmetric" if symmetric else "affine")


def test_what_is_clipped_and_its_noise_are_measured_on_the_samples(exported: Exported) -> None:
    model = exported.model
    x = torch.zeros(1, 4, 6, 6)
    scale = float(model.tensors["conv1.input"].qparams.scale)
    x[0, 0, 0, 0], x[0, 1, 0, 0] = 1e3, 10 * scale
    data = collect(model, read_manifest(exported.folder), exported.folder, "net", inputs=x)
    row = data.tensors[0]
    assert (row.name, data.samples) == ("conv1.input", 1)
    assert row.clipped == pytest.approx(1 / 144)
    # All of the noise is the one value: it is moved to the end of the grid.
    assert row.sqnr_db == pytest.approx(20 * math.log10(1e3 / (1e3 - row.high)), abs=0.01)
    assert row.histogram is not None
    assert (sum(row.histogram.counts), row.histogram.high) == (144, 1e3)


def test_a_weights_histogram_counts_its_integers(exported: Exported, data: ReportData) -> None:
    integers = exported.model.tensors["conv2.weight"].integers
    assert integers is not None
    histogram = data.layers[1].histogram
    assert (histogram.unit, histogram.grid_low, histogram.grid_high) == ("integer", -8, 7)
    counts = [int((integers == value).sum()) for value in range(-8, 8)]
    assert list(histogram.counts) == counts


def test_sizes_and_bit_operations_are_sums(data: ReportData) -> None:
    # 300 weights of half a byte, 11 scales, 11 biases.
    assert (data.bytes, data.float_bytes) == (150 + 44 + 44, 4 * 311)
    layers = 2 * 36 * 144 + 12
    assert data.bit_operations == layers * 4 * 8
    assert data.float_bit_operations == layers * 32 * 32


def test_files_and_agreement_are_the_manifests(exported: Exported, page: Parsed) -> None:
    manifest = read_manifest(exported.folder)
    listed = [file for entry in manifest["targets"].values() for file in entry["files"].values()]
    assert len(listed) == 4
    found = {row["File"] for rows in _tables(page, "File") for row in rows}
    assert found == {file["path"] for file in listed}
    runtimes = [row for rows in _tables(page, "Runtime") for row in rows]
    told = [
        (runtime["runtime"], number(output["max_steps"]))
        for entry in manifest["targets"].values()
        for runtime in entry["agreement"]["runtimes"]
        for output in runtime["outputs"]
    ]
    assert [(r["Runtime"], r["Largest difference, steps"]) for r in runtimes] == told
    for version in (manifest["python"], manifest["versions"]["torch"]):
        assert version in page.text


def _tables(page: Parsed, heading: str) -> list[list[dict[str, str]]]:
    found = [table for table in page.tables if table[0][0] == heading]
    return [[dict(zip(head, row, strict=True)) for row in rows] for head, *rows in found]


def test_the_worst_layers_of_a_file_come_first(data: ReportData) -> None:
    cann = data.targets[1]
    assert cann.name == "cann"
    own = [row.own_sqnr_db for row in cann.worst]
    assert own == sorted(own)
    assert cann.judgement


def test_phases_losses_and_reasons_are_those_of_the_run(data: ReportData, page: Parsed) -> None:
    assert data.training.loss == ((1, 2.0), (2, 1.0), (3, 0.5))
    assert "calibrate from step 0" in " ".join(page.text.split())
    (row,) = page.rows("Name", "Reason")
    assert [*row.values()] == ["norm", "GroupNorm", "its class has no quantized form"]


class Mixed(nn.Module):
    """A product of two computed tensors, and a layer that the recipe leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(y @ y.transpose(-1, -2) @ x)


def test_without_a_run_the_graph_says_what_is_float(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 6)
    recipe: Any = {"joins": False, "outputs": False, "exclude": ["last"]}
    model = convert(trained(Mixed(), x, recipe), x)
    export_all(model, [], tmp_path, "net")
    data = collect(model, read_manifest(tmp_path), tmp_path, "net")
    assert [(part.name, part.reason) for part in data.left_float] == [
        ("matmul", "2 of 2 tensors that it reads are not quantized"),
        ("matmul", "2 of 2 tensors that it reads are not quantized"),
        ("last.linear", "2 of 2 tensors that it reads are not quantized"),
    ]
    assert data.cautions
    counted = {(p.name, p.multiplications, p.bits) for p in data.products}
    assert counted == {
        *(("first", 5 * 36, (8, 8)), ("matmul", 5 * 5 * 6, (32, 32))),
        ("last.linear", 5 * 18, (32, 32)),
    }


def test_a_transposed_convolution_uses_a_weight_for_every_input() -> None:
    assert multiplications((4, 2, 3, 3), (1, 4, 5, 5), (1, 4, 10, 10), transposed=True) == 25 * 72


def test_a_layer_that_runs_twice_is_counted_once_by_size(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).relu())

    x = torch.randn(4, 6)
    model = convert(trained(Twice(), x), x)
    export_all(model, [], tmp_path, "net")
    data = collect(model, read_manifest(tmp_path), tmp_path, "net")
    assert [layer.bytes for layer in data.layers] == [36, 0]
    assert [layer.multiplications for layer in data.layers] == [36, 36]
    assert len({layer.input.name for layer in data.layers}) == 2


def test_external_data_counts_as_a_file(exported: Exported, tmp_path: Path) -> None:
    manifest = read_manifest(exported.folder)
    path = manifest["targets"]["fake_quant_onnx"]["files"]["model"]["path"]
    (tmp_path / path).write_bytes((exported.folder / path).read_bytes())
    (tmp_path / f"{path}.data").write_bytes(bytes(1234))
    data = collect(exported.model, manifest, tmp_path, "net", compare=False)
    files = data.targets[0].files
    assert [(file.path, file.bytes) for file in files[1:]] == [(f"{path}.data", 1234)]


def test_renamed_and_changed_files_are_named(exported: Exported, tmp_path: Path) -> None:
    for file in exported.folder.iterdir():
        if file.name != "net_qdq.onnx":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    record = tmp_path / "net_record.txt"
    record.write_text(record.read_text("utf-8") + "\n", encoding="utf-8")
    written = write_report(tmp_path, exported.model, name="net")
    assert written.wrong_files == (
        "fake_quant_onnx: net_qdq.onnx is missing",
        "cann: net_record.txt is changed since the export",
    )
    page = Parsed(written.path.read_text("utf-8"))
    assert "net_qdq.onnx is missing. Export again, or put the files back." in page.text


def test_values_that_are_not_finite_cost_no_page(exported: Exported) -> None:
    x = torch.full((1, 4, 6, 6), float("nan"))
    manifest = read_manifest(exported.folder)
    data = collect(exported.model, manifest, exported.folder, "net", inputs=x, compare=False)
    assert data.tensors[0].histogram is None
    assert "–" in render(data)


def test_an_export_without_targets_has_a_page(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    model = convert(trained(linear(), x), x)
    export_all(model, [], tmp_path, "net")
    page = Parsed(write_report(tmp_path, model).path.read_text("utf-8"))
    assert "The manifest lists no targets." in page.text


def test_the_manifest_stays_json_for_any_reader(exported: Exported) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (exported.folder / "manifest.json").read_text("utf-8")
    json.loads(text, parse_constant=refuse)
