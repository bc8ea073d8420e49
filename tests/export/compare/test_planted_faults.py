"""A broken number of a file is named in the right layer; `python -m benchmarks.planted_faults`
plants twenty in each target's file of a deeper network."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.planted_faults import FAULTS, ValuesAlone, is_found, plant, trained
from lightning_qat import QuantizedModel, export, verify
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import Artifact, Exporter
from lightning_qat.insight.compare import compare

TARGETS = ("fake_quant_onnx", "cann", "tflite")


@pytest.fixture(scope="module")
def network() -> tuple[QuantizedModel, Tensor]:
    return trained(blocks=2)


@pytest.fixture(scope="module", params=TARGETS)
def artifact(
    request: pytest.FixtureRequest,
    network: tuple[QuantizedModel, Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Artifact:
    if request.param == "tflite":
        pytest.importorskip("litert_torch")
    return export(network[0], request.param, tmp_path_factory.mktemp("files") / "net")


def test_a_healthy_file_has_no_departure(
    network: tuple[QuantizedModel, Tensor], artifact: Artifact
) -> None:
    comparison = compare(network[0], artifact, network[1])
    assert comparison.departure is None
    assert all(tensor.own is not None for tensor in comparison.tensors)
    assert "departure" not in str(comparison)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(
    network: tuple[QuantizedModel, Tensor], artifact: Artifact, fault: str, tmp_path: Path
) -> None:
    model, x = network
    path = artifact.files["model"]
    content, rng = path.read_bytes(), random.Random(fault)
    exporter = load_exporter(artifact.target)
    # A bias may be smaller than a step, so that its values alone prove nothing.
    readers: list[Exporter] = [exporter] if fault == "bias" else [exporter, ValuesAlone(exporter)]
    try:
        for _ in range(3):
            path.write_bytes(content)
            layer = plant(model, path, fault, rng)
            for reader in readers:
                assert is_found(model, artifact, x, reader, fault, layer), (fault, layer)
    finally:
        path.write_bytes(content)


def test_verify_names_the_layer(network: tuple[QuantizedModel, Tensor], tmp_path: Path) -> None:
    model, x = network
    broken = export(model, "fake_quant_onnx", tmp_path / "net")
    layer = plant(model, broken.files["model"], "weight", random.Random(3))
    agreement = verify(model, broken, x)
    assert agreement.judgement.startswith("First departure: ")
    assert layer in agreement.judgement
    assert agreement.judgement in str(agreement)


def test_verify_of_a_healthy_file_says_nothing_more(
    network: tuple[QuantizedModel, Tensor], tmp_path: Path
) -> None:
    model, _ = network
    healthy = export(model, "fake_quant_onnx", tmp_path / "net")
    agreement = verify(model, healthy, torch.randn(4, 3, 8, 8))
    assert agreement.judgement == ""
