"""Our NumPy executor: AMCT's files, hand-worked numbers, and other implementations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lightning_qat import export, verify
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.cann import AscendExecutor
from tests.exporters.cann.amct_goldens import CASES, load_case
from tests.exporters.contract import converted

Array = NDArray[Any]


def f32(values: Any) -> Array:
    return np.asarray(values, np.float32)


def i8(values: Any) -> Array:
    return np.asarray(values, np.int8)


def i32(values: Any) -> Array:
    return np.asarray(values, np.int32)


def one_bits(scale: float) -> int:
    return int(np.float32(scale).view(np.uint32))


def model_of(
    nodes: Sequence[onnx.NodeProto], constants: dict[str, Array], *, inputs: Sequence[str] = ("x",)
) -> onnx.ModelProto:
    """A model of float inputs whose last node's output is ``y``."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)


def run_one(op_type: str, x: Array, **attributes: Any) -> Array:
    node = helper.make_node(op_type, ["x"], ["y"], name="node", **attributes)
    return AscendExecutor(model_of([node], {})).run({"x": x})[0]


def run_layer(
    op_type: str,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    offset: float = 0.0,
    dst_type: str = "INT8",
    param: int | None = None,
    dequant: dict[str, Any] | None = None,
    **attributes: Any,
) -> Array:
    """Quantize with scale 1, run one layer on integers, dequantize with scale 1 unless given."""
    biases = [] if bias is None else ["b"]
    nodes = [
        helper.make_node(
            "AscendQuant", ["x"], ["q"], name="l.quant", scale=1.0, offset=offset, dst_type=dst_type
        ),
        helper.make_node(op_type, ["q", "w", *biases], ["acc"], name="l", **attributes),
        helper.make_node(
            "AscendDequant", ["acc", "p"], ["y"], name="l.dequant", **(dequant or {"dtype": 0})
        ),
    ]
    constants = {"w": weight, "p": np.array([one_bits(1) if param is None else param], np.uint64)}
    if bias is not None:
        constants["b"] = bias
    return AscendExecutor(model_of(nodes, constants)).run({"x": x})[0]


@pytest.mark.parametrize("name", [*CASES, "conv_a8w4"])
def test_amcts_deploy_model_gives_what_its_fake_quant_model_gives(name: str) -> None:
    case = load_case(name)
    (actual,) = AscendExecutor(case.deploy_path).run(case.inputs)
    # ONNX Runtime folds the last Mul into the weights of this net's convolutions; without its
    # optimizer the numbers are equal, as the next test shows.
    tolerance = 1e-6 if name == "branch" else 0.0
    np.testing.assert_allclose(actual, case.outputs[0], rtol=0, atol=tolerance)


def test_amcts_fake_quant_model_without_optimizer_gives_equal_numbers() -> None:
    case = load_case("branch")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = case.deploy_path.with_name("m_fake_quant_model.onnx")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, case.inputs)
    (actual,) = AscendExecutor(case.deploy_path).run(case.inputs)
    np.testing.assert_array_equal(actual, expected)


def test_quant_rounds_half_to_even_adds_the_offset_and_saturates() -> None:
    x = np.array([0.0, 0.25, 0.75, 1.25, -0.25, 100.0, -100.0], np.float32)
    # x * 2 = 0, 0.5, 1.5, 2.5, -0.5, 200, -200
    integers = run_one("AscendQuant", x, scale=2.0, offset=1.0, dst_type="INT8")
    assert integers.dtype == np.int8
    assert integers.tolist() == [1, 1, 3, 3, 1, 127, -128]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("Round", [2, -2]), ("Floor", [1, -2]), ("Ceil", [2, -1]), ("Trunc", [1, -1])],
)
def test_quant_honours_round_mode(mode: str, expected: list[int]) -> None:
    x = np.array([1.5, -1.5], np.float32)
    integers = run_one("AscendQuant", x, scale=1.0, offset=0.0, dst_type="INT8", round_mode=mode)
    assert integers.tolist() == expected


def test_quant_to_16_bits_uses_their_range() -> None:
    x = np.array([40000.0, -40000.0, 1000.0], np.float32)
    integers = run_one("AscendQuant", x, scale=1.0, offset=-1.0, dst_type="INT16")
    assert integers.dtype == np.int16
    assert integers.tolist() == [32767, -32768, 999]


def test_sqrt_mode_multiplies_twice() -> None:
    assert run_one("AscendQuant", f32([5]), scale=3.0, sqrt_mode=1).tolist() == [45]
    real = run_layer(
        *("MatMul", f32([[2]]), i8([[5]])),
        param=one_bits(0.5),
        dequant={"dtype": 0, "sqrt_mode": 1},
    )
    assert real.tolist() == [[2.5]]


@pytest.mark.parametrize(
    ("x", "scale", "offset", "plain", "half"),
    [
        # The data, in steps of 2 from 2048: 2049 is halfway and becomes the even 2048.
        (2049.0, 1.0, -2000.0, 49, 48),
        # 985.1 is 985 (steps of 0.5) and 0.1 is 0.0999755859375; their product 98.476, in steps of
        # 1/16, is 98.5, which goes to the even 98. In float32 it is 98.51.
        (985.1, 0.1, 0.0, 99, 98),
        # The sum is rounded, not the product: 0.5 + 1 = 1.5 goes to 2, 0.5 to 0.
        (0.5, 1.0, 1.0, 1, 2),
        # The sum, in steps of 1/16: 64.53125 is halfway and becomes 64.5, which goes to 64.
        (0.53125, 1.0, 64.0, 65, 64),
        # Above 65504 is infinity, which saturates.
        (7e4, 0.001, 0.0, 70, 127),
        (-7e4, 0.001, 0.0, -70, -128),
    ],
)
def test_kernels_without_float32_have_float16_after_every_operation(
    x: float, scale: float, offset: float, plain: int, half: int
) -> None:
    quant = helper.make_node(
        "AscendQuant", ["x"], ["y"], name="q", scale=scale, offset=offset, dst_type="INT8"
    )
    model = model_of([quant], {})
    assert AscendExecutor(model).run({"x": f32([x])})[0].tolist() == [plain]
    assert AscendExecutor(model, device_fp16=True).run({"x": f32([x])})[0].tolist() == [half]


def test_float16_data_of_16_bits_saturates_at_their_ends() -> None:
    quant = helper.make_node(
        "AscendQuant", ["x"], ["y"], name="q", scale=1.0, offset=0.0, dst_type="INT16"
    )
    executor = AscendExecutor(model_of([quant], {}), device_fp16=True)
    assert executor.run({"x": f32([4e4, -4e4])})[0].tolist() == [32767, -32768]


def test_a_scale_that_float16_does_not_hold_is_refused() -> None:
    quant = helper.make_node("AscendQuant", ["x"], ["y"], name="q", scale=1e5, dst_type="INT8")
    executor = AscendExecutor(model_of([quant], {}), device_fp16=True)
    with pytest.raises(ValueError, match=r"scale of 'q' must fit float16; got 100000"):
        executor.run({"x": f32([0.0])})


def test_antiquant_subtracts_the_offset_and_scales() -> None:
    quant = helper.make_node(
        "AscendQuant", ["x"], ["q"], name="a", scale=4.0, offset=-8.0, dst_type="INT8"
    )
    anti = helper.make_node("AscendAntiQuant", ["q"], ["y"], name="b", scale=0.25, offset=-8.0)
    x = np.array([0.0, 0.5, 0.6, 100.0], np.float32)
    (real,) = AscendExecutor(model_of([quant, anti], {})).run({"x": x})
    # integers -8, -6, -6, 127
    assert real.tolist() == [0.0, 0.5, 0.5, 33.75]


def test_relu_flag_and_dtype_are_honoured() -> None:
    x, weight = f32([[-3.0, 3.0]]), np.eye(2, dtype=np.int8)
    clamped = run_layer("MatMul", x, weight, dequant={"dtype": 0, "relu_flag": 1})
    assert clamped.tolist() == [[0.0, 3.0]]
    half = run_layer("MatMul", x, weight, dequant={"dtype": 1})
    assert half.dtype == np.float16


def test_padding_is_real_zero_whatever_the_offset() -> None:
    # Real 1 everywhere, kernel of ones: a corner sees 4 of them, an edge 6, the middle 9.
    x, weight = np.ones((1, 1, 3, 3), np.float32), np.ones((1, 1, 3, 3), np.int8)
    y = run_layer("Conv", x, weight, offset=-128.0, pads=[1, 1, 1, 1])
    assert y[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


def test_a_bias_is_added_to_the_accumulator_and_scales_run_along_channels() -> None:
    x, weight = f32([[1, 2]]), i8([[1, 0, 3], [0, 1, 3]])
    bias = i32([10, 20, 30])
    nodes = [
        helper.make_node("AscendQuant", ["x"], ["q"], scale=1.0, offset=5.0, dst_type="INT8"),
        helper.make_node("Gemm", ["q", "w", "b"], ["acc"], name="fc", transB=0),
        helper.make_node("AscendDequant", ["acc", "p"], ["y"], dtype=0),
    ]
    param = np.array([one_bits(s) for s in (1.0, 0.5, 0.25)], np.uint64)
    constants = {"w": weight, "b": bias, "p": param}
    (y,) = AscendExecutor(model_of(nodes, constants)).run({"x": x})
    # accumulators 11, 22, 39
    assert y.tolist() == [[11.0, 11.0, 9.75]]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("stride", "dilation", "pad", "groups"), [(1, 1, 0, 1), (2, 2, 3, 2)])
@pytest.mark.parametrize("offset", [0.0, -100.0])
def test_integer_convolutions_equal_torchs_in_double(
    rank: int, stride: int, dilation: int, pad: int, groups: int, offset: float
) -> None:
    rng = np.random.default_rng(0)
    size = (6, 7, 5)[:rank]
    x = rng.integers(-20, 20, (3, 4, *size)).astype(np.float32)
    weight = rng.integers(-128, 128, (6, 4 // groups, *(3, 2, 3)[:rank])).astype(np.int8)
    bias = rng.integers(-1000, 1000, 6).astype(np.int32)
    shared: dict[str, Any] = {"dilations": [dilation] * rank, "strides": [stride] * rank}
    shared["group"] = groups
    shared["pads"] = [pad] * 2 * rank
    actual = run_layer("Conv", x, weight, bias, offset=offset, **shared)
    conv: Any = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
    tensors = [torch.tensor(a, dtype=torch.float64) for a in (x, weight, bias)]
    expected = conv(*tensors, stride=stride, padding=pad, dilation=dilation, groups=groups)
    np.testing.assert_array_equal(actual, expected.numpy())

    weight = rng.integers(-128, 128, (4, 6 // groups, *(3, 2, 3)[:rank])).astype(np.int8)
    tensors[1] = torch.tensor(weight, dtype=torch.float64)
    extra = [stride - 1] * rank
    actual = run_layer(
        "ConvTranspose", x, weight, bias, offset=offset, output_padding=extra, **shared
    )
    transposed: Any = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[
        rank - 1
    ]
    expected = transposed(
        *tensors,
        stride=stride,
        padding=pad,
        output_padding=stride - 1,
        dilation=dilation,
        groups=groups,
    )
    np.testing.assert_array_equal(actual, expected.numpy())


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding_equals_onnx_runtimes(auto_pad: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (1, 2, 8, 8)).astype(np.float32)
    weight = rng.integers(-9, 9, (3, 2, 3, 2)).astype(np.float32)
    options: dict[str, Any] = {"auto_pad": auto_pad, "strides": [2, 3]}
    node = helper.make_node("Conv", ["x", "w"], ["y"], **options)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    actual = run_layer("Conv", x, weight.astype(np.int8), **options)
    np.testing.assert_array_equal(actual, expected)
    # The same code on real values, which no AscendQuant feeds.
    np.testing.assert_array_equal(AscendExecutor(model).run({"x": x})[0], expected)


@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(2, 2, 0), (3, 2, 1), (2, 3, 1)])
def test_pools_equal_torchs(kernel: int, stride: int, pad: int, ceil: int, counted: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 7)).astype(np.float32)
    options: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2}
    options |= {"pads": [pad] * 4, "ceil_mode": ceil}
    of = torch.nn.functional
    sizes = (kernel, stride, pad)
    largest = of.max_pool2d(torch.tensor(x), *sizes, ceil_mode=bool(ceil))
    np.testing.assert_array_equal(run_one("MaxPool", x, **options), largest.numpy())
    mean = of.avg_pool2d(torch.tensor(x), *sizes, bool(ceil), bool(counted))
    actual = run_one("AveragePool", x, count_include_pad=counted, **options)
    # Sums of up to nine numbers in another order.
    np.testing.assert_allclose(actual, mean.numpy(), rtol=0, atol=1e-6)


def test_blocks_of_images_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (5, 2, 4, 4)).astype(np.float32)
    weight = rng.integers(-9, 9, (4, 1, 3, 3)).astype(np.int8)
    whole = run_layer("Conv", x, weight, group=2)
    monkeypatch.setattr("lightning_qat_exporters.cann.executor.layers._BLOCK_BYTES", 1200)
    np.testing.assert_array_equal(run_layer("Conv", x, weight, group=2), whole)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_elements_are_gathered_from_more_than_32(dim: int) -> None:
    x = torch.randn(40, 50)
    index = torch.randint(-40, 40, (33, 35))
    model = model_of(
        [helper.make_node("GatherElements", ["x", "index"], ["y"], axis=dim)],
        {"index": np.asarray(index)},
    )
    (y,) = AscendExecutor(model).run({"x": np.asarray(x)})
    expected = x.gather(dim, index % x.shape[dim])
    np.testing.assert_array_equal(y, np.asarray(expected))


def test_what_is_not_defined_is_refused() -> None:
    x, weight = f32([[1.0]]), i8([[1]])
    with pytest.raises(ValueError, match=r"round_mode of 'node' must be one of .* got 'Up'"):
        run_one("AscendQuant", x, scale=1.0, round_mode="Up")
    with pytest.raises(ValueError, match=r"dst_type of 'node' must be one of .* got 'INT4'"):
        run_one("AscendQuant", x, scale=1.0, dst_type="INT4")
    with pytest.raises(ValueError, match=r"dtype of 'l.dequant' must be one of .* got 27"):
        run_layer("MatMul", x, weight, dequant={"dtype": 27})
    with pytest.raises(ValueError, match=r"'l.dequant' must be a float32 in the low 32 bits"):
        run_layer("MatMul", x, weight, param=2**40)
    with pytest.raises(ValueError, match=r"'node' cannot quantize NaN"):
        run_one("AscendQuant", f32([np.nan]), scale=1.0)
    with pytest.raises(ValueError, match=r"accumulator of 'l' must fit int32; .* to 2147483648"):
        run_layer("Gemm", x, weight, i32([2**31 - 1]))
    with pytest.raises(ValueError, match=r"'l' has 5 input channels and a weight for 2\."):
        run_layer("Conv", np.ones((1, 5, 1, 1), np.float32), np.ones((1, 2, 1, 1), np.int8))
    with pytest.raises(ValueError, match=r"inputs must be \['x'\]; got \['z'\]"):
        AscendExecutor(model_of([helper.make_node("Relu", ["x"], ["y"])], {})).run({"z": x})
    dequant = helper.make_node("AscendDequant", ["x", "p"], ["y"], name="d")
    with pytest.raises(ValueError, match=r"must read the accumulator .* 'd' reads 'x'"):
        AscendExecutor(model_of([dequant], {"p": np.array([1], np.uint64)}))


def test_sums_that_float32_cannot_hold_are_exact() -> None:
    # 127 * (1040 * 127 + 25) = 16777335 = 2**24 + 119; the bias leaves 1 of it.
    x, weight = np.full((1, 1041), 127, np.float32), np.full((1041, 1), 127, np.int8)
    weight[-1] = 25
    assert run_layer("Gemm", x, weight, i32([-16777334])).item() == 1.0
    conv = run_layer("Conv", x[..., None], weight.reshape(1, -1, 1), i32([-16777334]))
    assert conv.item() == 1.0
    # The bias alone may be what float32 cannot hold: 16777217 - 1.
    few = run_layer("Gemm", f32([[-1]]), i8([[1]]), i32([2**24 + 1]), param=one_bits(1))
    assert few.item() == 2**24


def test_accumulators_of_16_bit_data_may_leave_int32() -> None:
    x, weight = np.full((1, 600), 32767, np.float32), np.full((600, 1), 127, np.int8)
    y = run_layer("MatMul", x, weight, dst_type="INT16")
    assert y.item() == np.float32(600 * 32767 * 127)


def test_verify_shows_what_float16_kernels_may_cost(tmp_path: Path) -> None:
    model, exporter = converted("residual_add", samples=64), CannExporter(device_fp16=True)
    artifact = export(model, exporter, tmp_path / "net")
    exact, standard, simulated, half = verify(model, artifact, exporter=exporter).runtimes
    assert half.runtime == "reference executor, float16"
    assert standard.runtime == "onnxruntime, deploy model"
    assert standard.max_steps == exact.max_steps
    assert exact.max_steps == simulated.max_steps < half.max_steps <= 4
