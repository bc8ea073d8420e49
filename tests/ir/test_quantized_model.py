"""The converted model as data: invariants, saved and loaded."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportGraphSignature

from lightning_qat.convert.convert import convert
from lightning_qat.ir.exported_program import Constants
from lightning_qat.ir.quantized_model import QuantizedModel, QuantizedTensor
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat.recipe.recipe import Recipe
from tests.models import NETWORKS, inputs_for, linear, trained

# The result


@pytest.mark.parametrize("network", NETWORKS)
def test_a_saved_model_is_the_same_model(network: str, tmp_path: Path) -> None:
    x = inputs_for(network)
    quantized = convert(trained(NETWORKS[network][0](), x), x, recipe=Recipe.load("w4a8"))
    quantized.save(tmp_path / "deep" / "model.pt2")
    loaded = QuantizedModel.load(tmp_path / "deep" / "model.pt2")
    assert (loaded.input_names, loaded.output_names) == (
        quantized.input_names,
        quantized.output_names,
    )
    assert Recipe.from_dict(loaded.recipe) == Recipe.load("w4a8")
    assert list(loaded.tensors) == list(quantized.tensors)
    for key, tensor in quantized.tensors.items():
        assert loaded.tensors[key].qparams.equal(tensor.qparams)
        if tensor.integers is not None:
            assert torch.equal(loaded.tensors[key].integers, tensor.integers)  # type: ignore[arg-type]
    assert torch.equal(loaded(x), quantized(x))
    assert torch.equal(loaded.example_inputs[0][0], quantized.example_inputs[0][0])
    assert loaded(x[:1]).shape[0] == 1


def test_loading_what_is_not_there_or_not_ours_says_so(tmp_path: Path) -> None:
    missing, other = tmp_path / "no.pt2", tmp_path / "other.pt2"
    with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
        QuantizedModel.load(missing)
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not a model that QuantizedModel\.save wrote"):
        QuantizedModel.load(other)
    torch.export.save(torch.export.export(linear(), (torch.randn(2, 6),)), other)
    with pytest.raises(ValueError, match=r"is not a model that QuantizedModel\.save wrote"):
        QuantizedModel.load(other)


def test_a_file_of_a_newer_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs_for("linear")
    quantized = convert(trained(linear(), x), x)
    monkeypatch.setattr("lightning_qat.ir.quantized_model.FORMAT_VERSION", 99)
    quantized.save(tmp_path / "new.pt2")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has format version 99; this version of lightning-qat"):
        QuantizedModel.load(tmp_path / "new.pt2")


def test_integers_outside_their_grid_are_no_tensor() -> None:
    qparams = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), IntegerGrid(-8, 7))
    with pytest.raises(ValueError, match=r"'w': integers must lie in .*; got 0 \.\. 8"):
        QuantizedTensor("w", "weight", qparams, torch.tensor([0, 8]))


def test_scales_that_do_not_fit_the_axis_are_no_tensor() -> None:
    scale, origin = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="'w': one scale per channel of axis 0 is needed; got 2"):
        QuantizedTensor(
            "w", "weight", QParams(scale, origin, IntegerGrid(-8, 7), 0), torch.zeros(3, 2).char()
        )


def test_a_constant_s_name_is_used_once() -> None:
    x = inputs_for("linear")
    program = convert(trained(linear(), x), x).program
    name, constants = next(iter(program.state_dict)), Constants(program)
    first, second = (constants.add(name, torch.tensor(value)) for value in (1.0, 2.0))
    assert (constants.name(first), constants.name(second)) == (f"{name}_1", f"{name}_2")
    assert (constants.value(first), constants.value(second)) == (1.0, 2.0)


def test_the_constants_of_a_program_are_listed_equally_often_for_all_depths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = []
    real = ExportGraphSignature.inputs_to_buffers.fget

    def counted(signature: ExportGraphSignature) -> Any:
        listed[-1] += 1
        return real(signature)

    monkeypatch.setattr(ExportGraphSignature, "inputs_to_buffers", property(counted))
    for depth in (1, 4):
        x = torch.randn(2, 2, 4, 4)
        pairs = [(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(depth)]
        model = trained(nn.Sequential(*(layer for pair in pairs for layer in pair)), x)
        listed.append(0)
        assert len(convert(model, x).layers) == depth
    assert listed[0] == listed[1]
