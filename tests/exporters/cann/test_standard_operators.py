"""ONNX Runtime on a deploy model: AMCT's files, hand-worked numbers, torch in double."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lightning_qat import convert, prepare, verify
from lightning_qat.export.protocol import Array
from lightning_qat_exporters.cann import AscendExecutor, CannExporter
from lightning_qat_exporters.cann.exporter import REFERENCE, SIMULATION, STANDARD
from lightning_qat_exporters.cann.standard_operators import layers, translate
from lightning_qat_exporters.cann.standard_operators.session import DeploySession
from tests.exporters.cann.amct_goldens import CASES, GOLDENS, load_case

Run = Callable[..., Array]
RECURRENT = ("lstm", "lstm_pt", "gru", "gru_seq4")


def param(*scales: float) -> Array:
    return np.array(scales, np.float32).view(np.uint32).astype(np.uint64)


def quant(
    source: str, made: str, *, scale: float = 1.0, offset: float = 0.0, **attributes: Any
) -> onnx.NodeProto:
    attributes = {"scale": scale, "offset": offset, "dst_type": "INT8", **attributes}
    return helper.make_node("AscendQuant", [source], [made], name=f"{made}.quant", **attributes)


def deploy_file(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Array],
    shape: Sequence[int | None] | None = None,
) -> Path:
    """A deploy model of a float input ``x`` whose last node gives ``y``; as AMCT, no shapes."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    path = folder / "net_deploy_model.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), path
    )
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run nodes on ``x``; the output is that of the last one."""

    def run(x: Any, *nodes: onnx.NodeProto, **constants: Array) -> Array:
        path = deploy_file(tmp_path, nodes, constants, np.shape(x))
        return DeploySession(path).run({"x": np.asarray(x, np.float32)})["y"]

    return run


@pytest.fixture
def run_layer(run: Run) -> Run:
    """Quantize with scale 1, run one layer on integers, dequantize with scale 1 unless given."""

    def run_layer(
        op_type: str,
        x: Any,
        weight: Array,
        bias: Array | None = None,
        scales: Sequence[float] = (1.0,),
        quantize: Mapping[str, Any] = {},
        dequantize: Mapping[str, Any] = {},
        **attributes: Any,
    ) -> Array:
        layer = helper.make_node(
            op_type, ["q", "w", *(["b"] if bias is not None else [])], ["a"], "l", **attributes
        )
        dequant = helper.make_node("AscendDequant", ["a", "p"], ["y"], "l.dequant", **dequantize)
        constants = {"w": weight, "p": param(*scales), **({} if bias is None else {"b": bias})}
        return run(x, quant("x", "q", **quantize), layer, dequant, **constants)

    return run_layer


# AMCT's files, against the NumPy executor


@pytest.mark.parametrize("name", [*CASES, "conv_a8w4"])
def test_amcts_deploy_models_give_what_the_numpy_executor_gives_to_the_bit(name: str) -> None:
    case = load_case(name)
    (wanted,) = AscendExecutor(case.deploy_path).run(case.inputs)
    (found,) = DeploySession(case.deploy_path).run(case.inputs).values()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", RECURRENT)
def test_amcts_device_nodes_give_the_same_up_to_the_order_of_float_sums(name: str) -> None:
    path = GOLDENS / name / "m_deploy_model.onnx"
    arrays = np.load(path.with_name("io.npz"))
    names = [value.name for value in onnx.load(path).graph.input]
    inputs = {name: arrays[f"in{i}"] for i, name in enumerate(names)}
    wanted = AscendExecutor(path).run(inputs)
    found = DeploySession(path).run(inputs).values()
    for ours, executors in zip(found, wanted, strict=True):
        # Outputs are below 1, steps are of 1/128: 0 steps apart.
        np.testing.assert_allclose(ours, executors, rtol=0, atol=3e-7)


def test_the_translation_and_the_numpy_executor_share_no_code() -> None:
    folder = Path(translate.__file__).parent
    for one, other in ((folder, "executor"), (folder.with_name("executor"), folder.name)):
        for file in one.glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert f"cann.{other}" not in (node.module or ""), file


# The three operators


def test_quant_rounds_half_to_even_adds_the_offset_and_saturates(run: Run) -> None:
    # x * 2 = 0, 0.5, 1.5, 2.5, -0.5, 200, -200, infinity
    x = [0.0, 0.25, 0.75, 1.25, -0.25, 100.0, -100.0, np.inf]
    integers = run(x, quant("x", "y", scale=2.0, offset=1.0))
    assert integers.dtype == np.int8
    assert integers.tolist() == [1, 1, 3, 3, 1, 127, -128, 127]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("Round", [2, -2]), ("Floor", [1, -2]), ("Ceil", [2, -1]), ("Trunc", [1, -1])],
)
def test_quant_honours_round_mode(run: Run, mode: str, expected: list[int]) -> None:
    assert run([1.5, -1.5], quant("x", "y", round_mode=mode)).tolist() == expected


def test_quant_to_16_bits_uses_their_range(run: Run) -> None:
    integers = run([4e4, -4e4, 1e3], quant("x", "y", offset=-1.0, dst_type="INT16"))
    assert integers.dtype == np.int16
    assert integers.tolist() == [32767, -32768, 999]


def test_antiquant_subtracts_the_offset_and_scales(run: Run) -> None:
    anti = helper.make_node("AscendAntiQuant", ["q"], ["y"], scale=0.25, offset=-8.0)
    # integers -8, -6, -6, 127
    real = run([0.0, 0.5, 0.6, 100.0], quant("x", "q", scale=4.0, offset=-8.0), anti)
    assert real.tolist() == [0.0, 0.5, 0.5, 33.75]


def test_sqrt_mode_multiplies_twice(run: Run, run_layer: Run) -> None:
    assert run([5], quant("x", "y", scale=3.0, sqrt_mode=1)).tolist() == [45]
    weight = np.array([[5]], np.int8)
    real = run_layer("MatMul", [[2]], weight, scales=[0.5], dequantize={"sqrt_mode": 1})
    assert real.tolist() == [[2.5]]


def test_relu_flag_and_dtype_are_honoured(run_layer: Run) -> None:
    x, weight = [[-3.0, 3.0]], np.eye(2, dtype=np.int8)
    assert run_layer("MatMul", x, weight, dequantize={"relu_flag": 1}).tolist() == [[0.0, 3.0]]
    assert run_layer("MatMul", x, weight, dequantize={"dtype": 1}).dtype == np.float16


# Layers


def test_padding_is_real_zero_whatever_the_offset(run_layer: Run) -> None:
    # Real 1 everywhere, kernel of ones: a corner sees 4 of them, an edge 6, the middle 9.
    x, weight = np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3), np.int8)
    for padding in ({"pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}):
        y = run_layer("Conv", x, weight, quantize={"offset": -128.0}, **padding)
        assert y[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_bias_is_added_in_integers_and_scales_run_along_channels(
    run_layer: Run, transposed: int
) -> None:
    weight = np.array([[1, 0, 3], [0, 1, 3]], np.int8)
    y = run_layer(
        *("Gemm", [[1, 2]], weight.T if transposed else weight),
        bias=np.array([10, 20, 30], np.int32),
        scales=[1.0, 0.5, 0.25],
        quantize={"offset": 5.0},
        transB=transposed,
    )
    # accumulators 11, 22, 39
    assert y.tolist() == [[11.0, 11.0, 9.75]]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("stride", "dilation", "pad", "groups"), [(1, 1, 0, 1), (2, 2, 3, 2)])
@pytest.mark.parametrize("quantize", [{"offset": -100.0}, {"dst_type": "INT16"}])
def test_convolutions_equal_torchs_in_double(
    run_layer: Run,
    rank: int,
    stride: int,
    dilation: int,
    pad: int,
    groups: int,
    quantize: dict[str, Any],
) -> None:
    rng = np.random.default_rng(0)
    most = 30000 if quantize.get("dst_type") else 20
    x = rng.integers(-most, most, (3, 4, *(6, 7, 5)[:rank])).astype(np.float32)
    kernel = (3, 2, 3)[:rank]
    bias = rng.integers(-1000, 1000, 6).astype(np.int32)
    scales = 2.0 ** rng.integers(-3, 3, 6)
    options = {"strides": [stride] * rank, "dilations": [dilation] * rank, "group": groups}
    sizes = {"stride": stride, "padding": pad, "dilation": dilation, "groups": groups}
    more: dict[str, Any] = {"output_padding": [stride - 1] * rank}
    for op_type, shape in (("Conv", (6, 4 // groups)), ("ConvTranspose", (4, 6 // groups))):
        weight = rng.integers(-128, 128, (*shape, *kernel)).astype(np.int8)
        options |= {"pads": [pad] * 2 * rank, **(more if op_type == "ConvTranspose" else {})}
        found = run_layer(op_type, x, weight, bias, scales, quantize, **options)
        name = f"conv{'_transpose' if op_type == 'ConvTranspose' else ''}{rank}d"
        tensors = [torch.tensor(a, dtype=torch.float64) for a in (x, weight, bias)]
        if op_type == "ConvTranspose":
            sizes["output_padding"] = stride - 1
        wanted = getattr(torch, name)(*tensors, **sizes).numpy()
        wanted = wanted.astype(np.float32) * scales.reshape(-1, *[1] * rank)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("op_type", ["Gemm", "MatMul", "Conv", "ConvTranspose"])
def test_sums_that_float32_cannot_hold_are_exact(run_layer: Run, op_type: str) -> None:
    # 127 * (1040 * 127 + 25) = 16777335 = 2**24 + 119, which float32 rounds to an even number.
    x, weight = np.full((1, 1041), 127), np.full((1041, 1), 127, np.int8)
    weight[-1] = 25
    if op_type.startswith("Conv"):
        x, weight = x[..., None], weight[..., None]
        weight = weight.swapaxes(0, 1) if op_type == "Conv" else weight
    bias = None if op_type == "MatMul" else np.array([-16777334], np.int32)
    y = run_layer(op_type, x, weight, bias, quantize={"dst_type": "INT16"})
    assert y.item() == (1.0 if bias is not None else 16777336.0)
    wide = run_layer(op_type, 258 * x, weight, quantize={"dst_type": "INT16"})
    assert wide.item() == np.float32(258 * 16777335)


@pytest.mark.parametrize(
    ("features", "limit"),
    [(70_000, 2**24), (30, 2**10), (100, 2**10), (300, 2**10)],  # digits of 4, 4, 2, 1 bits
)
def test_a_channel_of_many_large_weights_is_split_into_digits(
    run_layer: Run, features: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A channel's weights alone sum to half of the limit or more; 2**24 is that of float32.
    monkeypatch.setattr(layers, "_EXACT", limit)
    weight = np.stack((np.full(features, 127), np.full(features, -128)), 1).astype(np.int8)
    x = np.full((1, features), 127)
    sums = np.array([127 * 127 * features, -128 * 127 * features])
    wide = run_layer("MatMul", x, weight, quantize={"dst_type": "INT16"})
    np.testing.assert_array_equal(wide, sums[None].astype(np.float32))
    bias = (np.array([5, -7]) - sums).astype(np.int32)
    assert run_layer("Gemm", x, weight, bias).tolist() == [[5.0, -7.0]]


def test_a_bias_that_float32_cannot_hold_is_exact(run_layer: Run) -> None:
    y = run_layer("Gemm", [[-1]], np.array([[1]], np.int8), np.array([2**24 + 1], np.int32))
    assert y.item() == 2**24


def test_two_layers_read_one_quant_and_an_integer_output_beside_them(run: Run) -> None:
    nodes = [
        quant("x", "q", offset=3.0),
        helper.make_node("MatMul", ["q", "w"], ["a"], "one"),
        helper.make_node("AscendDequant", ["a", "p"], ["b"], "one.dequant"),
        helper.make_node("Gemm", ["q", "w"], ["c"], "two"),
        helper.make_node("AscendDequant", ["c", "p"], ["d"], "two.dequant"),
        helper.make_node("AscendAntiQuant", ["q"], ["e"], "join", scale=1.0, offset=3.0),
        helper.make_node("Sum", ["b", "d", "e"], ["y"]),
    ]
    y = run([[5.0]], *nodes, w=np.array([[10]], np.int8), p=param(1.0))
    assert y.item() == 50 + 50 + 5


# Two weights of 4 bits in a byte


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (None, 4, None, None), (2, 1, 4, 1)])
def test_packed_weights_are_found_by_shapes_that_onnx_infers(
    tmp_path: Path, shape: tuple[int | None, ...]
) -> None:
    # The low half of a byte is the first channel: 1, -1 | 2, -8, and for the product 3 | 4, 5 | 6.
    halves = np.array([0xF1, 0x82], np.uint8).view(np.int8)
    product = np.array([[0x43], [0x65]], np.uint8).view(np.int8)
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        quant("r", "q"),
        helper.make_node("Conv", ["q", "w"], ["a"], "conv"),
        helper.make_node("AscendDequant", ["a", "p"], ["b"], "conv.dequant"),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        quant("d", "e"),
        helper.make_node("MatMul", ["e", "v"], ["f"], "fc"),
        helper.make_node("AscendDequant", ["f", "p"], ["y"], "fc.dequant"),
    ]
    constants = {
        "shape": np.array([0, 4, 1, 1] if shape[1] == 4 else [2, 4, 1, 1]),
        "w": np.tile(halves.reshape(1, 2, 1, 1), (4, 1, 1, 1)),
        "v": product,
        "p": param(1.0),
    }
    path = deploy_file(tmp_path, nodes, constants, shape)
    x = np.array([[7, 3, 1, 0], [0, 0, 0, -2]], np.float32)
    x = x.reshape(2, *(1 if size is None else size for size in shape[1:]))
    # The convolution: 7 - 3 + 2 = 6 and 16 for each of 4; the product has 3 + 4 + 5 + 6 = 18.
    (y,) = DeploySession(path).run({"x": x}).values()
    assert y.tolist() == [[108.0], [288.0]]
    np.testing.assert_array_equal(AscendExecutor(path).run({"x": x})[0], y)


# What must not pass in silence


def test_nan_cannot_be_quantized(run: Run) -> None:
    with pytest.raises(ValueError, match=r"'y.quant' cannot quantize NaN; its input holds some"):
        run([0.0, np.nan], quant("x", "y"))


@pytest.mark.parametrize(("sign", "bias"), [(1, 2**31 - 128), (-1, -(2**31) + 127)])
def test_an_accumulator_of_8_bit_data_must_fit_int32(run_layer: Run, sign: int, bias: int) -> None:
    weight, biases = np.array([[1]], np.int8), np.array([bias], np.int32)
    # float32 of the last int32 there is on either side
    assert run_layer("Gemm", [[127 * sign]], weight, biases).item() == sign * 2.0**31
    with pytest.raises(ValueError, match="accumulator of 'l' must fit int32; here it does not"):
        run_layer("Gemm", [[127 * sign]], weight * 2, biases)


def test_everything_without_a_form_is_named_in_one_message(tmp_path: Path) -> None:
    nodes = [
        quant("x", "a", round_mode="Up"),
        helper.make_node("Conv", ["a", "w"], ["b"], "after a refused one"),
        helper.make_node("AscendDequant", ["b", "p"], ["c"], "this too"),
        quant("c", "d", dst_type="INT4"),
        helper.make_node("AscendQuant", ["x"], ["e"], "no scale"),
        quant("x", "f"),
        helper.make_node("MatMul", ["f", "real"], ["g"], "real weight"),
        helper.make_node("AscendDequant", ["f", "p"], ["h"], "no layer"),
        helper.make_node("Gemm", ["f", "w2"], ["i"], "good"),
        helper.make_node("AscendDequant", ["i", "high"], ["j"], "high bits"),
        helper.make_node("Gemm", ["f", "w2"], ["k"], "factors", alpha=2.0),
        helper.make_node("Gemm", ["x", "w2"], ["l"], "real data"),
        helper.make_node("AscendWeightQuant", ["x"], ["y"], "weights"),
    ]
    constants = {
        **{"w": np.ones((1, 1, 1, 1), np.int8), "w2": np.ones((1, 1), np.int8)},
        **{"real": np.ones((1, 1), np.float32), "p": param(1.0), "high": np.array([2**40], "u8")},
    }
    with pytest.raises(ValueError, match="no form in standard operators") as raised:
        DeploySession(deploy_file(tmp_path, nodes, constants))
    _, *lines = str(raised.value).splitlines()
    wanted = {
        "a.quant": "round_mode must be one of ['Round', 'Floor', 'Ceil', 'Trunc']; got 'Up'",
        "d.quant": "dst_type must be one of ['INT8', 'INT16']; got 'INT4'",
        "no scale": "it must have a scale; without one ATC reads 0",
        "real weight": "data of an AscendQuant needs a constant int8 weight; got float32",
        "no layer": "it must read the accumulator of Conv, ConvTranspose, Gemm or MatMul",
        "high bits": "its parameter must be a constant with a float32 in the low 32 bits",
        "factors": "an integer Gemm must have alpha = beta = 1 and transA = 0",
        "real data": "a layer with an int8 weight must read an AscendQuant",
        "weights": "ONNX has no operator of that name",
    }
    for line, (name, reason) in zip(lines, wanted.items(), strict=True):
        assert line.startswith(f"  {name!r}")
        assert reason in line


def test_verify_says_what_onnx_runtime_cannot_run_and_reports_the_executor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
    prepare(net, "int8", x)
    net(x)
    model = convert(net, x)
    artifact = CannExporter().export(model, tmp_path / "net")
    monkeypatch.setattr(
        layers, "_EXACT", 4
    )  # as if float32 held 2 bits: no layer of real size fails
    agreement = verify(model, artifact)
    assert [r.runtime for r in agreement.runtimes] == [REFERENCE, SIMULATION]
    assert agreement.max_steps == 0
    (caution,) = (c for c in agreement.cautions if "cannot run the file" in c)
    assert caution.startswith(f"{STANDARD} cannot run the file: These nodes have no form in")
    assert "'0' (MatMul)" in caution or "'0' (Gemm)" in caution
    assert "a channel must have fewer than 2 weights for exact sums in float32; got 3" in caution


def test_a_device_node_with_an_unknown_attribute_is_refused(tmp_path: Path) -> None:
    model = onnx.load(GOLDENS / "gru" / "m_deploy_model.onnx")
    (clip,) = [a for a in model.graph.node[0].attribute if a.name == "clip"]
    clip.f = 3.0
    onnx.save(model, tmp_path / "gru.onnx")
    with pytest.raises(ValueError, match=r"BasicGRU\w+\): clip must be -1.0; got 3.0"):
        DeploySession(tmp_path / "gru.onnx")


def test_device_nodes_with_offsets_equal_the_numpy_executors(tmp_path: Path) -> None:
    for name in ("lstm", "gru_seq4"):
        path = GOLDENS / name / "m_deploy_model.onnx"
        model = onnx.load(path)
        for attribute in model.graph.node[0].attribute:
            if attribute.name in ("quant_offset_x", "quant_offset_h"):
                attribute.f = -20.0
        onnx.save(model, tmp_path / f"{name}.onnx")
        rng = np.random.default_rng(0)
        inputs = {
            value.name: rng.normal(
                size=[d.dim_value for d in value.type.tensor_type.shape.dim]
            ).astype(np.float32)
            for value in model.graph.input
        }
        wanted = AscendExecutor(model).run(inputs)
        found = DeploySession(tmp_path / f"{name}.onnx").run(inputs).values()
        for ours, executors in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, executors, rtol=0, atol=3e-7)
