"""The table of operators: every name in it exists where it is said to exist."""

import onnx
import pytest
import torch
import torch.nn.functional as F

from lightning_qat.function_hooks.function_table import FUNCTION_TABLE, fixed_output_range
from lightning_qat.function_hooks.relu_fusion import CLAMP_CALLS
from lightning_qat.ir.operators import (
    CLAMPS,
    FIXED_OUTPUT_RANGES,
    LAYER_TYPES,
    OPERATORS,
    RECURRENT_TYPES,
    Operator,
    fixed_scale_and_zero_point,
    value_preserving,
)

ROWS = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


@ROWS
def test_torch_has_every_torch_spelling(operator: Operator) -> None:
    namespaces = (torch, torch.Tensor, F, torch._C._nn)
    missing = [n for n in operator.torch if not any(hasattr(space, n) for space in namespaces)]
    assert missing == []


@ROWS
def test_aten_has_every_aten_name(operator: Operator) -> None:
    assert [name for name in operator.aten if not hasattr(torch.ops.aten, name)] == []


NEWEST = ("scaled_dot_product_attention", "rms_norm", "silu")
"""Operators of ONNX's opsets 23 and 24."""


@ROWS
def test_onnx_has_every_operator_type(operator: Operator) -> None:
    if onnx.defs.onnx_opset_version() < 24 and operator.name in NEWEST:
        pytest.skip("this onnx is older than the operator")
    assert [name for name in operator.onnx if not onnx.defs.has(name)] == []


def test_onnx_has_the_layers() -> None:
    assert all(onnx.defs.has(name) for name in LAYER_TYPES + RECURRENT_TYPES)


@pytest.mark.parametrize("field", ["torch", "aten", "onnx"])
def test_no_name_is_in_two_rows(field: str) -> None:
    names = [name for operator in OPERATORS for name in getattr(operator, field)]
    assert len(names) == len(set(names))
    assert len({operator.name for operator in OPERATORS}) == len(OPERATORS)


def test_a_function_mode_sees_every_row_that_has_a_trait_and_a_torch_spelling() -> None:
    expected = {o.name for o in OPERATORS if o.trait is not None and o.torch}
    assert {traits.name for traits in FUNCTION_TABLE.values()} == expected


@pytest.mark.parametrize(
    ("name", "function", "scale", "zero_point"),
    [
        ("sigmoid", torch.sigmoid, 1 / 256, -128),
        ("softmax", torch.softmax, 1 / 256, -128),
        ("hardsigmoid", F.hardsigmoid, 1 / 256, -128),
        ("tanh", torch.tanh, 1 / 128, 0),
    ],
)
def test_fixed_ranges_are_those_of_tflites_specification(
    name: str, function: object, scale: float, zero_point: int
) -> None:
    assert fixed_scale_and_zero_point(name) == (scale, zero_point)
    assert fixed_output_range(function, (), {}) == FIXED_OUTPUT_RANGES[name]  # type: ignore[arg-type]


def test_only_padding_keeps_values_in_some_calls_only() -> None:
    assert {"Relu", "MaxPool", "Transpose"} <= set(value_preserving("onnx"))
    assert {"view", "slice", "upsample_nearest2d"} <= set(value_preserving("aten"))
    assert not {"pad", "constant_pad_nd", "cat", "clamp"} & set(value_preserving("aten"))


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "ends"),
    [
        (F.relu6, (), {}, (0.0, 6.0)),
        (F.hardtanh, (), {}, (-1.0, 1.0)),
        (F.hardtanh, (-2.0,), {"max_val": 3.0}, (-2.0, 3.0)),
        (F.hardtanh, (0.0, 4.0, True), {}, (0.0, 4.0)),
    ],
)
def test_a_clamp_reads_its_ends_from_the_call(
    function: object, args: tuple[float, ...], kwargs: dict[str, float], ends: tuple[float, float]
) -> None:
    x = torch.tensor([-50.0, 50.0])
    call = CLAMP_CALLS[function](x, *args, **kwargs)  # type: ignore[index]
    assert call.ends == fixed_output_range(function, (x, *args), kwargs) == ends  # type: ignore[arg-type]
    assert call.in_place == (len(args) == 3)
    assert torch.equal(call(), torch.tensor(ends))


def test_relu_and_one_sided_clamps_have_no_range() -> None:
    x = torch.zeros(1)
    assert CLAMPS["relu"].high is None
    assert fixed_output_range(torch.relu, (x,), {}) is None
    assert fixed_output_range(torch.clamp, (x, 0.0), {}) is None
    assert fixed_output_range(torch.clamp, (x,), {"min": 0.0, "max": 2.0}) == (0.0, 2.0)
    assert fixed_output_range(torch.Tensor.clip_, (x, 1.0, 2.0), {}) is None


def test_an_in_place_spelling_of_relu_changes_its_input() -> None:
    x = torch.ones(2)
    assert CLAMP_CALLS[torch.relu_](x).in_place
    assert CLAMP_CALLS[F.relu](x, inplace=True).in_place
    assert not CLAMP_CALLS[F.relu](input=x).in_place
