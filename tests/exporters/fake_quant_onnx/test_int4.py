"""Weights of 4 bits as ONNX's INT4: half the bytes, the same numbers, the same outputs."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lightning_qat import QuantizedModel, Recipe, convert, export, verify
from lightning_qat.export.protocol import as_arrays
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.exporters.contract import KINDS, converted
from tests.models import inputs_for, trained

# The worker that has the networks of test_fake_quant_onnx.
pytestmark = pytest.mark.xdist_group("onnx")

INT4 = onnx.TensorProto.INT4
RUNTIMES = FakeQuantOnnxExporter().runtimes


def weights(file: Path) -> dict[str, onnx.TensorProto]:
    """Initializers that hold the integers of weights."""
    tensors = onnx.load(file).graph.initializer
    return {t.name: t for t in tensors if t.name.endswith(("weight", "weight_transposed"))}


def both(model: QuantizedModel, folder: Path, **options: Any) -> tuple[Any, Any]:
    """The files with int8 and with INT4 weights."""
    return tuple(
        export(model, FakeQuantOnnxExporter(opset=21, int4_weights=wanted, **options), folder / n)
        for n, wanted in (("int8", False), ("int4", True))
    )


@pytest.mark.parametrize("activation_type", ["uint8", "int8"])
@pytest.mark.parametrize("network", KINDS)
def test_the_outputs_are_equal_to_the_bit(
    network: str, activation_type: str, tmp_path: Path
) -> None:
    model = converted(network, "w4a8")
    exporter = FakeQuantOnnxExporter(opset=21)
    wide, packed = both(model, tmp_path, activation_type=activation_type)
    types = [t.data_type == INT4 for t in weights(packed.files["model"]).values()]
    grids = [
        t.qparams.grid == IntegerGrid(-8, 7) for t in model.tensors.values() if t.kind == "weight"
    ]
    assert sorted(types) == sorted(grids)
    assert any(types)
    x = as_arrays(model.flat_inputs((inputs_for(network, 8),), {}))
    literal = RUNTIMES[0]
    expected, found = (exporter.run(a, literal, x) for a in (wide, packed))
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    agreement = verify(model, packed, None, FakeQuantOnnxExporter(opset=21, int4_weights=True))
    assert agreement.parameter_differences == ()


def test_a_weight_takes_half_a_byte_and_the_notes_say_so(tmp_path: Path) -> None:
    model = converted("linear", "w4a8")
    wide, packed = both(model, tmp_path)
    sizes = [
        {name: len(tensor.raw_data) for name, tensor in weights(a.files["model"]).items()}
        for a in (wide, packed)
    ]
    # 6 x 5 and 5 x 3 weights; the odd nibble of the second fills its byte.
    assert list(sizes[0].values()) == [30, 15]
    assert list(sizes[1].values()) == [15, 8]
    assert wide.notes == ()
    assert packed.notes == ("Weights of 4 bits as INT4: 2, 23 bytes for 45.",)


def test_weights_of_other_widths_stay_int8(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    recipe = Recipe(overrides={"0": {"weight": {"bits": 4}}, "1": {"weight": {"bits": 3}}})
    model = convert(trained(nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), x, recipe), x)
    _, packed = both(model, tmp_path)
    types = [tensor.data_type for tensor in weights(packed.files["model"]).values()]
    assert types == [INT4, onnx.TensorProto.INT8, onnx.TensorProto.INT8]
    assert packed.notes == ("Weights of 4 bits as INT4: 1, 18 bytes for 36.",)


def test_a_file_without_such_weights_says_so(tmp_path: Path) -> None:
    _, packed = both(converted("linear"), tmp_path)
    assert packed.notes == ("int4_weights: no weight has 4 bits, so none is stored as INT4.",)


def test_a_weight_that_batch_norm_has_mirrored_stays_int8_and_is_named(tmp_path: Path) -> None:
    model = converted("conv_bn_relu", "w4a8")
    assert model.tensors["0.weight"].qparams.grid == IntegerGrid(-8, 8)
    _, packed = both(model, tmp_path)
    assert packed.notes[1] == (
        "0.weight: stored as INT8, because a negative factor of the batch norm folded into it "
        "makes 8 of -8."
    )


def test_a_changed_integer_is_found(tmp_path: Path) -> None:
    model = converted("linear", "w4a8")
    _, packed = both(model, tmp_path)
    proto = onnx.load(packed.files["model"])
    tensor = next(t for t in proto.graph.initializer if t.name == "0.weight")
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
    onnx.save(proto, packed.files["model"])
    exporter = FakeQuantOnnxExporter(opset=21, int4_weights=True)
    assert exporter.differences(model, packed) == (
        "0.weight: 1 of 30 values of integers differ from the model's",
    )


def test_an_opset_without_int4_is_refused() -> None:
    with pytest.raises(ValueError, match=r"int4_weights needs opset 21.*INT4; got 20"):
        FakeQuantOnnxExporter(int4_weights=True)
