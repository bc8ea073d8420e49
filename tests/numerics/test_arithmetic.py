"""Quantization itself, against torch's operators, ONNX Runtime and formulas in float64."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from lightning_qat.numerics.arithmetic import (
    affine_qparams,
    along_axis,
    arq_scale,
    dequantize,
    quantize,
    quantize_bias,
    symmetric_scale,
)
from lightning_qat.numerics.fake_quantize import fake_quantize
from lightning_qat.numerics.qparams import IntegerGrid

GRIDS = [IntegerGrid(-128, 127), IntegerGrid(-127, 127), IntegerGrid(-8, 7), IntegerGrid(-2, 1)]


def probe(scale: float, grid: IntegerGrid) -> Tensor:
    """Ties, values around them, values far outside, both zeros."""
    steps = torch.arange(2 * grid.qmin - 1, 2 * grid.qmax + 2, dtype=torch.float64) / 2
    ties = (steps * scale).to(torch.float32)
    around = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-1e9, 1e9)]
    extremes = torch.tensor([0.0, -0.0, 1e6, -1e6, 1e-30])
    return torch.cat((ties, *around, extremes, torch.randn(200) * scale * grid.qmax))


# Rounding and saturation


def test_rounds_half_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    steps = quantize(x, torch.tensor(1.0), torch.tensor(0), IntegerGrid(-8, 7))
    assert steps.tolist() == [-2, -2, 0, 0, 2, 2]


def test_rounds_before_the_zero_point_is_added() -> None:
    x = torch.tensor([0.5, 1.5])
    assert quantize(x, torch.tensor(1.0), torch.tensor(1), IntegerGrid(-8, 7)).tolist() == [1, 3]


def test_saturates_outside_the_range() -> None:
    x = torch.tensor([-100.0, 100.0, float("-inf"), float("inf")])
    assert quantize(x, torch.tensor(0.5), torch.tensor(3), IntegerGrid(-8, 7)).tolist() == [
        -8,
        7,
        -8,
        7,
    ]
    assert fake_quantize(x, torch.tensor(0.5), torch.tensor(3.0), IntegerGrid(-8, 7)).tolist() == [
        -5.5,
        2.0,
        -5.5,
        2.0,
    ]


def test_real_is_scale_times_integer_minus_zero_point() -> None:
    integers = torch.tensor([-8, 0, 7], dtype=torch.int8)
    assert dequantize(integers, torch.tensor(0.5), torch.tensor(-3)).tolist() == [-2.5, 1.5, 5.0]


@pytest.mark.parametrize("zero_point", [-128, -7, 0, 127])
def test_every_integer_survives_the_way_to_real_and_back(zero_point: int) -> None:
    integers = torch.arange(-128, 128).to(torch.int8)
    scale, origin = torch.tensor(0.0371), torch.tensor(zero_point)
    real = dequantize(integers, scale, origin)
    assert torch.equal(quantize(real, scale, origin, IntegerGrid(-128, 127)), integers)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("zero_point", [0, 1, -2])
@pytest.mark.parametrize("scale", [0.25, 0.0371, 3.3])
def test_fake_quantize_is_dequantize_after_quantize(
    grid: IntegerGrid, zero_point: int, scale: float
) -> None:
    x, s, z = probe(scale, grid), torch.tensor(scale), torch.tensor(zero_point)
    expected = dequantize(quantize(x, s, z, grid), s, z)
    assert torch.equal(fake_quantize(x, s, z.float(), grid), expected)


def test_fake_quantize_is_idempotent() -> None:
    x, scale, origin = torch.randn(1000), torch.tensor(0.0123), torch.tensor(-5.0)
    once = fake_quantize(x, scale, origin, IntegerGrid(-128, 127))
    assert torch.equal(fake_quantize(once, scale, origin, IntegerGrid(-128, 127)), once)


def test_scaling_values_and_scale_by_a_power_of_two_changes_no_integer() -> None:
    x, scale, origin = torch.randn(1000), torch.tensor(0.0123), torch.tensor(3)
    grid = IntegerGrid(-128, 127)
    assert torch.equal(
        quantize(x, scale, origin, grid), quantize(x * 1024, scale * 1024, origin, grid)
    )


def test_an_integer_tensor_has_the_dtype_of_its_grid() -> None:
    x = torch.tensor([-1e9, 1e9])
    wide = quantize(x, torch.tensor(1.0), torch.tensor(0), IntegerGrid(-32768, 32767))
    assert wide.dtype is torch.int16
    assert wide.tolist() == [-32768, 32767]
    assert quantize(x, torch.tensor(1.0), torch.tensor(0), IntegerGrid(-2, 1)).dtype is torch.int8


# Against torch. ATen multiplies with 1 / scale in float32 where we (and ONNX) divide, so the two
# may round differently within an ulp of a tie. Powers of two have exact reciprocals.


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("zero_point", [-2, -1, 0, 1])
@pytest.mark.parametrize("scale", [2.0**-6, 0.5, 4.0])
def test_equals_torch_per_tensor(grid: IntegerGrid, zero_point: int, scale: float) -> None:
    x = probe(scale, grid)
    ours = fake_quantize(x, torch.tensor(scale), torch.tensor(float(zero_point)), grid)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, grid.qmin, grid.qmax)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_equals_torch_per_channel(axis: int) -> None:
    x, grid = torch.randn(4, 4, 2, 4) * 3, IntegerGrid(-127, 127)
    scale = torch.tensor([2.0**-6, 2.0**-5, 2.0**-7, 0.5])
    ours = fake_quantize(x, along_axis(scale, 4, axis), torch.tensor(0.0), grid)
    origin = torch.zeros(4, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, origin, axis, grid.qmin, grid.qmax)
    assert torch.equal(ours, theirs)


def test_the_gradient_equals_torch_s() -> None:
    x = torch.cat((torch.linspace(-3, 3, 101), torch.tensor([-8.5, -8.75, 7.5, 7.25])))
    grads = []
    for fake in (
        lambda v: fake_quantize(v, torch.tensor(0.25), torch.tensor(2.0), IntegerGrid(-8, 7)),
        lambda v: torch.fake_quantize_per_tensor_affine(v, 0.25, 2, -8, 7),
    ):
        leaf = x.clone().requires_grad_()
        (fake(leaf) * torch.arange(1.0, len(x) + 1)).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)  # type: ignore[arg-type]


# Against ONNX Runtime


def onnx_qdq(x: Tensor, scale: float, zero_point: int, dtype: type) -> tuple[Tensor, Tensor]:
    """QuantizeLinear and DequantizeLinear of a graph built by hand."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "qdq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [
            helper.make_tensor_value_info("q", kind, ["n"]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"]),
        ],
        [
            onnx.numpy_helper.from_array(np.array(scale, np.float32), "s"),
            onnx.numpy_helper.from_array(np.array(zero_point, dtype), "z"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    q, y = session.run(["q", "y"], {"x": x.numpy()})
    return torch.from_numpy(q), torch.from_numpy(y)


@pytest.mark.parametrize("zero_point", [-128, -3, 0, 127])
@pytest.mark.parametrize("scale", [0.0371, 0.1, 3.3, 2.0**-6])
def test_equals_onnx_runtime_at_8_bits(zero_point: int, scale: float) -> None:
    grid = IntegerGrid(-128, 127)
    x, s, z = probe(scale, grid), torch.tensor(scale), torch.tensor(zero_point)
    integers, real = onnx_qdq(x, scale, zero_point, np.int8)
    assert torch.equal(quantize(x, s, z, grid), integers)
    assert torch.equal(dequantize(integers, s, z), real)
    assert torch.equal(fake_quantize(x, s, z.float(), grid), real)


@pytest.mark.parametrize("zero_point", [-32768, 0, 1000])
def test_equals_onnx_runtime_at_16_bits(zero_point: int) -> None:
    grid, scale = IntegerGrid(-32768, 32767), 0.0007
    x = torch.cat((torch.randn(2000) * 10, torch.tensor([1e6, -1e6, 0.00035, 0.00105])))
    integers, real = onnx_qdq(x, scale, zero_point, np.int16)
    s, z = torch.tensor(scale), torch.tensor(zero_point)
    assert torch.equal(quantize(x, s, z, grid), integers)
    assert torch.equal(fake_quantize(x, s, z.float(), grid), real)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(500) * 2).to(dtype)
    scale, origin, grid = torch.tensor(0.0371), torch.tensor(-9.0), IntegerGrid(-128, 127)
    result = fake_quantize(x, scale, origin, grid)
    assert result.dtype is dtype
    assert torch.equal(result, fake_quantize(x.float(), scale, origin, grid).to(dtype))


def test_autocast_changes_nothing() -> None:
    x, scale, origin = torch.randn(500), torch.tensor(0.0371), torch.tensor(-9.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fake_quantize(x, scale, origin, IntegerGrid(-128, 127))
    assert torch.equal(inside, fake_quantize(x, scale, origin, IntegerGrid(-128, 127)))


def test_the_input_is_never_written_to() -> None:
    x = torch.randn(50)
    before = x.clone()
    fake_quantize(x, torch.tensor(0.1), torch.tensor(0.0), IntegerGrid(-8, 7))
    quantize(x, torch.tensor(0.1), torch.tensor(0), IntegerGrid(-8, 7))
    assert torch.equal(x, before)


def test_no_elements_are_no_problem() -> None:
    x = torch.empty(0, 3, requires_grad=True)
    result = fake_quantize(x, torch.tensor(0.1), torch.tensor(0.0), IntegerGrid(-8, 7))
    result.sum().backward()
    assert result.shape == (0, 3)
    assert x.grad is not None


# Gradients


@pytest.mark.parametrize(
    ("steps", "inside"),
    [(-8.51, 0.0), (-8.49, 1.0), (-8.0, 1.0), (0.0, 1.0), (7.0, 1.0), (7.49, 1.0), (7.51, 0.0)],
)
def test_the_gradient_is_1_where_the_rounded_integer_is_on_the_grid(
    steps: float, inside: float
) -> None:
    x = torch.tensor([steps * 0.25], requires_grad=True)
    fake_quantize(x, torch.tensor(0.25), torch.tensor(0.0), IntegerGrid(-8, 7)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [inside]


def test_the_gradient_passes_everywhere_when_asked_to() -> None:
    x = torch.tensor([-100.0, 0.3, 100.0], requires_grad=True)
    y = fake_quantize(
        x, torch.tensor(0.25), torch.tensor(0.0), IntegerGrid(-8, 7), gradient_everywhere=True
    )
    (y * torch.tensor([2.0, 3.0, 5.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 3.0, 5.0]


def test_the_gradient_keeps_the_dtype_of_the_input() -> None:
    x = torch.randn(8, dtype=torch.bfloat16, requires_grad=True)
    fake_quantize(x, torch.tensor(0.25), torch.tensor(0.0), IntegerGrid(-8, 7)).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.bfloat16


def test_over_many_steps_the_gradient_is_the_slope_of_the_function() -> None:
    # Over whole steps the staircase rises by exactly the run: slope 1 inside, 0 outside.
    scale, origin, grid, steps = 0.25, 1.0, IntegerGrid(-8, 7), 2
    x = torch.arange(-5.0, 5.0, 0.1) + 0.0123
    low, high = (grid.qmin - origin) * scale, (grid.qmax - origin) * scale
    run = steps * scale
    inside = (x - run > low) & (x + run < high)
    outside = (x + run < low - scale) | (x - run > high + scale)
    assert inside.sum() > 10
    assert outside.sum() > 10

    def f(v: Tensor) -> Tensor:
        return fake_quantize(v, torch.tensor(scale), torch.tensor(origin), grid)

    leaf = x.clone().requires_grad_()
    f(leaf).sum().backward()
    slope = (f(x + run) - f(x - run)) / (2 * run)
    assert leaf.grad is not None
    sure = inside | outside
    # The difference of two numbers of size 3 in float32, over 1.
    torch.testing.assert_close(slope[sure], leaf.grad[sure], atol=1e-6, rtol=0)


def test_scale_and_zero_point_get_no_gradient() -> None:
    x = torch.randn(4, requires_grad=True)
    scale = torch.tensor(0.25, requires_grad=True)
    fake_quantize(x, scale, torch.tensor(0.0), IntegerGrid(-8, 7)).sum().backward()
    assert scale.grad is None


# Scales


@pytest.mark.parametrize(
    ("low", "high", "grid", "scale", "zero_point"),
    [
        (-1.0, 1.55, IntegerGrid(-128, 127), 0.01, -28),
        (0.0, 2.55, IntegerGrid(-128, 127), 0.01, -128),
        (-2.55, 0.0, IntegerGrid(-128, 127), 0.01, 127),
        # Zero is always covered: relu and padding are exact.
        (1.0, 2.55, IntegerGrid(-128, 127), 0.01, -128),
        (-2.55, -1.0, IntegerGrid(-128, 127), 0.01, 127),
        (-0.75, 0.75, IntegerGrid(-8, 7), 0.1, 0),
        (-1.0, 0.5, IntegerGrid(-8, 7), 0.1, 2),
        (-2.0, 1.0, IntegerGrid(-2, 1), 1.0, 0),
        # Half to even: -8 + 7.5 = -0.5 -> 0.
        (-1.875, 1.875, IntegerGrid(-8, 7), 0.25, 0),
        (0.0, 0.0, IntegerGrid(-128, 127), 1.0, -128),
        (1e-44, 1e-44, IntegerGrid(-128, 127), 1.0, -128),
    ],
)
def test_affine_ranges_worked_by_hand(
    low: float, high: float, grid: IntegerGrid, scale: float, zero_point: int
) -> None:
    found = affine_qparams(torch.tensor(low), torch.tensor(high), grid)
    # The hand's scale is decimal: one rounding of the float32 subtraction and one of the division.
    torch.testing.assert_close(found[0], torch.tensor(scale), rtol=2.4e-7, atol=0)
    assert found[1].item() == zero_point


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_affine_range_is_covered_to_half_a_step(bits: int) -> None:
    grid = IntegerGrid.activation(bits)
    low, high = -torch.rand(200) * 3, torch.rand(200) * 3
    scale, origin = affine_qparams(low, high, grid)
    # Moving the zero point to an integer moves both ends by at most half a step; 1e-5 steps is the
    # float32 error of the range in units of the step.
    assert bool((dequantize(torch.tensor(grid.qmin), scale, origin) - low < 0.50001 * scale).all())
    assert bool((high - dequantize(torch.tensor(grid.qmax), scale, origin) < 0.50001 * scale).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_real_zero_is_exact_in_every_affine_range(bits: int) -> None:
    grid = IntegerGrid.activation(bits)
    scale, origin = affine_qparams(torch.randn(200), torch.randn(200).abs(), grid)
    zeros = fake_quantize(torch.zeros(200), scale, origin, grid)
    assert torch.equal(zeros, torch.zeros(200))


@pytest.mark.parametrize(
    ("bits", "largest", "scale", "integers"),
    [
        (8, 12.7, 0.1, [-127, 127]),
        (4, 7.5, 1.0, [-8, 7]),
        (2, 1.5, 1.0, [-2, 1]),
    ],
)
def test_the_largest_weight_lands_on_the_end_of_the_grid(
    bits: int, largest: float, scale: float, integers: list[int]
) -> None:
    grid = IntegerGrid.weight(bits)
    found = symmetric_scale(torch.tensor(largest), grid)
    # A decimal written down in float32, divided once.
    torch.testing.assert_close(found, torch.tensor(scale), rtol=1.2e-7, atol=0)
    ends = torch.tensor([-largest, largest])
    assert quantize(ends, found, torch.tensor(0), grid).tolist() == integers


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-38])
def test_a_range_too_small_for_a_scale_gets_scale_1(largest: float) -> None:
    assert symmetric_scale(torch.tensor(largest), IntegerGrid(-127, 127)).item() == 1.0


@pytest.mark.parametrize(
    ("low", "high", "grid", "divided", "by"),
    [
        (-1.0, 1.27, IntegerGrid(-128, 127), 1.27, 127),
        (-1.28, 1.0, IntegerGrid(-128, 127), 1.28, 128),
        (-1.0, 1.0, IntegerGrid(-128, 127), 1.0, 127),
        (0.5, 1.0, IntegerGrid(-128, 127), 1.0, 127),
        (-1.0, -0.5, IntegerGrid(-128, 127), 1.0, 128),
        (-1.0, 0.5, IntegerGrid(-8, 7), 1.0, 8),
        (0.0, 0.0, IntegerGrid(-128, 127), 1.0, 1),
        (-1e-6, 1e-6, IntegerGrid(-128, 127), 1.0, 1),
    ],
)
def test_arq_lets_the_farther_side_touch_its_end(
    low: float, high: float, grid: IntegerGrid, divided: float, by: int
) -> None:
    expected = torch.tensor(divided) / by
    assert torch.equal(arq_scale(torch.tensor(low), torch.tensor(high), grid), expected)


def test_arq_takes_each_channel_for_itself() -> None:
    low, high = torch.tensor([-1.28, -1.0]), torch.tensor([1.0, 1.27])
    expected = torch.stack((torch.tensor(1.28) / 128, torch.tensor(1.27) / 127))
    assert torch.equal(arq_scale(low, high, IntegerGrid(-128, 127)), expected)


@pytest.mark.parametrize(
    ("axis", "shape"), [(None, ()), (0, (3, 1, 1)), (1, (1, 3, 1)), (-1, (1, 1, 3))]
)
def test_along_axis_makes_values_broadcast(axis: int | None, shape: tuple[int, ...]) -> None:
    values = torch.tensor(1.0) if axis is None else torch.arange(3.0)
    assert along_axis(values, 3, axis).shape == shape


# Bias


def test_a_bias_is_rounded_half_to_even_on_the_accumulator_s_grid() -> None:
    bias = torch.tensor([0.0625, 0.1875, -0.0625, 1.0])
    found = quantize_bias(bias, torch.tensor(0.5), torch.tensor(0.25))
    assert found.tolist() == [0, 2, 0, 8]
    assert found.dtype is torch.int64


def test_a_bias_is_divided_in_float64_by_a_step_made_in_float32() -> None:
    bias, scale_input, scale_weight = torch.randn(64), torch.tensor(0.0123), torch.rand(64) * 1e-3
    steps = (np.float32(0.0123) * scale_weight.numpy()).astype(np.float64)
    expected = np.rint(bias.numpy().astype(np.float64) / steps)
    found = quantize_bias(bias, scale_input, scale_weight)
    assert np.array_equal(found.numpy(), expected.astype(np.int64))


def test_a_bias_is_not_clipped() -> None:
    found = quantize_bias(torch.tensor([1.0]), torch.tensor(1e-6), torch.tensor([1e-6]))
    assert found.item() > 2**31


@pytest.mark.parametrize(
    "grid", [IntegerGrid(-128, 127), IntegerGrid(-8, 7), IntegerGrid(-127, 127), IntegerGrid(-2, 2)]
)
@pytest.mark.parametrize("zero_point", [0.0, -2.0])
def test_backward_from_the_input_is_backward_from_the_mask_at_ties_too(
    grid: IntegerGrid, zero_point: float
) -> None:
    scale, origin = torch.tensor(0.25), torch.tensor(zero_point)
    ties = (torch.arange(-140.0, 141.0) + 0.5) * 0.25
    x = torch.cat((ties, torch.randn(1000) * 20))
    gradients = []
    for saves_input in (True, False):
        leaf = x.clone().requires_grad_()
        fake_quantize(leaf, scale, origin, grid, saves_input=saves_input).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])
    assert 0 < float(gradients[0].mean()) < 1


def test_without_saves_input_the_input_may_change_in_place() -> None:
    x = torch.randn(8, requires_grad=True)
    y = x * 1.0
    out = fake_quantize(y, torch.tensor(0.25), torch.tensor(0.0), IntegerGrid(-8, 7))
    y.add_(100.0)
    out.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
