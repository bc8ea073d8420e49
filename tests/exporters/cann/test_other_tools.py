"""What other tools write between QuantizeLinear and DequantizeLinear, and around the pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_qat.amct.record import parse_record
from lightning_qat.export.convert_onnx import convert_qat_model
from lightning_qat.export.protocol import UnsupportedByTarget
from lightning_qat_exporters import CannExporter
from tests.exporters.cann.qdq_files import net_file, saved
from tests.exporters.cann.qdq_graphs import Qdq, proto
from tests.exporters.cann.test_convert_qat_model import agreeing, ops, real, rng

X = {"x": real(2, 4, 6, 6)}


def conv(net: Qdq, data: str, name: str = "conv", groups: int = 1, scale: Any = None) -> str:
    """A convolution of four channels to four on quantized data."""
    integers = rng().integers(-90, 90, (4, 4 // groups, 3, 3))
    weight = net.weight(integers, [0.01, 0.02, 0.005, 0.01] if scale is None else scale)
    bias = net.constant([0.5, -0.25, 0.0, 1.0], np.float32)
    pads = [1, 1, 1, 1]
    return net.node("Conv", data, weight, bias, name=name, pads=pads, group=groups)


def quantized(net: Qdq, x: str, scale: float = 0.05, zero: int = 3, dtype: Any = np.int8) -> str:
    return net.node("QuantizeLinear", x, net.constant(scale, np.float32), net.constant(zero, dtype))


def dequantized(net: Qdq, q: str, scale: float = 0.05, zero: int = 3, dtype: Any = np.int8) -> str:
    return net.node(
        "DequantizeLinear", q, net.constant(scale, np.float32), net.constant(zero, dtype)
    )


def moved(net: Qdq, q: str, how: str) -> str:
    """Integers after an operator that outputs values of its input."""
    if how == "transpose twice":
        q = net.node("Transpose", q, perm=[0, 2, 3, 1])
        return net.node("Transpose", q, perm=[0, 3, 1, 2])
    if how == "reshape":
        q = net.node("Reshape", q, net.constant([2, 4, 36], np.int64))
        return net.node("Reshape", q, net.constant([2, 4, 6, 6], np.int64))
    if how == "squeeze":
        q = net.node("Unsqueeze", q, net.constant([1], np.int64))
        return net.node("Squeeze", q, net.constant([1], np.int64))
    if how == "slice":
        starts, ends = net.constant([1], np.int64), net.constant([5], np.int64)
        return net.node("Slice", q, starts, ends, net.constant([2], np.int64))
    if how == "concat":
        return net.node("Concat", q, q, axis=2)
    if how == "max pool":
        return net.node("MaxPool", q, kernel_shape=[2, 2], strides=[2, 2])
    if how == "pad with zero point":
        pads = net.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
        return net.node("Pad", q, pads, net.constant(3, np.int8))
    if how == "pad with zeros":
        return net.node("Pad", q, net.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    assert how == "cast to its own type"
    return net.node("Cast", q, to=TensorProto.INT8)


MOVES = (
    *("transpose twice", "reshape", "squeeze", "slice", "concat", "max pool"),
    *("pad with zero point", "pad with zeros", "cast to its own type"),
)


@pytest.mark.parametrize("how", MOVES)
def test_integers_may_be_moved_between_a_pair(how: str, tmp_path: Path) -> None:
    net = Qdq([2, 4, 6, 6])
    data = dequantized(net, moved(net, quantized(net, "x"), how))
    done = agreeing(net_file(net, tmp_path, conv(net, data)), X, 1e-5)
    # A fill of 0 is no real zero here, so the layer's own input would have to be rounded again.
    assert done.layers == (() if how == "pad with zeros" else ("conv",))


def test_moved_integers_that_are_an_output_are_written_as_integers(tmp_path: Path) -> None:
    net = Qdq([2, 4, 6, 6])
    q = net.node("Transpose", quantized(net, "x"), perm=[0, 2, 3, 1], name="move")
    net.node("Relu", dequantized(net, q), name="reader")
    done = agreeing(output_of_type(net, TensorProto.INT8, q, tmp_path), X, 1e-5)
    assert done.outputs == ("y",)


@pytest.mark.parametrize("how", ["transpose", "transpose and reshape", "concat", "max pool"])
def test_moved_integers_that_only_an_output_reads_are_written_as_integers(
    how: str, tmp_path: Path
) -> None:
    """TFLite's files with int8 outputs, by tf2onnx: what is quantized is moved to NHWC and out."""
    net = Qdq([2, 4, 6, 6])
    y = conv(net, dequantized(net, quantized(net, "x")))
    q = quantized(net, y, 0.0937, -5)
    if how in ("concat", "max pool"):
        q = moved(net, q, how)
    else:
        q = net.node("Transpose", q, perm=[0, 2, 3, 1])
    if how == "transpose and reshape":
        q = net.node("Reshape", q, net.constant([2, -1], np.int64))
    done = agreeing(output_of_type(net, TensorProto.INT8, q, tmp_path), X, 0)
    assert (done.layers, done.outputs) == (("conv",), ("y",))


def test_integers_of_two_grids_that_meet_are_refused_by_name(tmp_path: Path) -> None:
    net = Qdq([2, 4, 6, 6])
    parts = quantized(net, "x"), quantized(net, "x", 0.1)
    data = dequantized(net, net.node("Concat", *parts, axis=1, name="cat"))
    with pytest.raises(UnsupportedByTarget, match=r"integers are read by 'cat' \(Concat\)"):
        agreeing(net_file(net, tmp_path, net.node("Relu", data)), X, 1e-5)


@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 120), (np.int8, -7), (np.uint16, 9)])
def test_a_graph_input_of_integers_is_taken(dtype: Any, zero: int, tmp_path: Path) -> None:
    net = Qdq([2, 4, 6, 6], opset=21)
    y = conv(net, dequantized(net, "x", zero=zero, dtype=dtype))
    model = proto(net.model(y))
    model.graph.input[0].type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(
        np.dtype(dtype)
    )
    low, high = (100, 140) if dtype is np.uint16 else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    inputs = {"x": rng().integers(low, high, (2, 4, 6, 6)).astype(dtype)}
    done = agreeing(saved(model, tmp_path), inputs, 1e-5)
    assert done.layers == ("conv",)


def test_integers_that_another_operator_makes_are_taken(tmp_path: Path) -> None:
    net = Qdq([2, 4, 6, 6])
    whole = net.node("Cast", net.node("Clip", "x", *bounds(net)), to=TensorProto.INT8)
    done = agreeing(net_file(net, tmp_path, conv(net, dequantized(net, whole))), X, 1e-5)
    assert done.layers == ("conv",)


def bounds(net: Qdq) -> tuple[str, str]:
    return net.constant(-100.0, np.float32), net.constant(100.0, np.float32)


def output_of_type(net: Qdq, type_: int, output: str, folder: Path) -> Path:
    model = proto(net.model(output))
    model.graph.output[0].type.tensor_type.elem_type = type_
    return saved(model, folder)


@pytest.mark.parametrize("clip", [False, True])
def test_an_output_of_uint8_stays_one(clip: bool, tmp_path: Path) -> None:
    net = Qdq([2, 4, 6, 6])
    q = quantized(net, conv(net, net.fake("x", 0.05)), 0.03125, 7, np.uint8)
    if clip:
        q = net.node("Clip", q, *(net.constant(end, np.uint8) for end in (10, 200)))
    source = output_of_type(net, TensorProto.UINT8, q, tmp_path)
    done = agreeing(source, X, 1e-5)
    assert done.outputs == ("y",)
    for role in ("model", "fake_quant"):
        (output,) = onnx.load(done.files[role]).graph.output
        assert output.type.tensor_type.elem_type == TensorProto.UINT8


def by_channel(zero: Any = 0, groups: int = 4) -> tuple[Qdq, str]:
    """A pair with a scale per channel, and a convolution."""
    net = Qdq([2, 4, 6, 6])
    zeros = np.broadcast_to(np.asarray(zero, np.int8), 4)
    factors = [net.constant([0.5, 0.25, 0.125, 2.0], np.float32), net.constant(zeros)]
    q = net.node("QuantizeLinear", "x", *factors, axis=1)
    return net, conv(net, net.node("DequantizeLinear", q, *factors, axis=1), groups=groups)


def test_a_depthwise_layer_takes_its_input_s_scales_into_its_weight(tmp_path: Path) -> None:
    net, y = by_channel(zero=5)
    record = tmp_path / "record.txt"
    done = agreeing(net_file(net, tmp_path, y), X, 1e-5, record_file=record)
    assert done.layers == ("conv",)
    assert "Mul" in ops(done)
    (layer,) = parse_record(record.read_text())
    assert (layer.scale_d, layer.offset_d) == (1.0, 5)
    # The weight's scales 0.01, 0.02, 0.005, 0.01 times those of the channels.
    assert layer.scale_w == pytest.approx((0.005, 0.005, 0.000625, 0.02))


@pytest.mark.parametrize("zero", [0, [0, 1, -3, 7]])
def test_any_other_layer_of_such_an_input_is_float_on_the_same_values(
    zero: Any, tmp_path: Path
) -> None:
    net, y = by_channel(zero, groups=1)
    done = agreeing(net_file(net, tmp_path, y), X, 1e-5)
    assert done.layers == ()
    assert any("conv" in r and "scale per channel" in r for r in done.left_float)


def test_a_pair_may_read_another_pair(tmp_path: Path) -> None:
    # Brevitas quantizes an output, and again what reads it.
    net = Qdq([2, 4, 6, 6])
    finer = net.fake("x", 0.05, 3)
    twice = net.fake(finer, 0.125, 1)
    same = net.fake(twice, 0.125, 1)
    done = agreeing(net_file(net, tmp_path, conv(net, same), net.node("Relu", finer)), X, 1e-5)
    assert done.layers == ("conv",)


def test_sizes_may_be_read_from_integers(tmp_path: Path) -> None:
    net = Qdq([2, 4, 6, 6])
    q = quantized(net, "x")
    shape = net.node("Shape", q)
    flat = net.node("Reshape", q, net.constant([-1], np.int64))
    data = dequantized(net, net.node("Reshape", flat, shape))
    assert agreeing(net_file(net, tmp_path, conv(net, data)), X, 1e-5).layers == ("conv",)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("stride", [1, 2])
def test_auto_pad_in_three_dimensions_is_written_as_pads(
    op: str, auto_pad: str, stride: int, tmp_path: Path
) -> None:
    net = Qdq([1, 2, 5, 6, 7])
    weight = net.weight(rng().integers(-90, 90, (2, 2, 3, 2, 4)), 0.01)
    options = {"auto_pad": auto_pad, "strides": [stride] * 3, "kernel_shape": [3, 2, 4]}
    net.node(op, net.fake("x", 0.05), weight, name="conv", **options)
    source = net_file(net, tmp_path, "v3")
    done = agreeing(source, {"x": real(1, 2, 5, 6, 7)}, 1e-5)
    assert done.layers == ("conv",)
    errors = [f.must for f in CannExporter().lint(done.files["model"]) if f.severity == "error"]
    # Whatever its padding: CANN has it in float alone.
    in_float = "a transposed convolution of three dimensions must be float"
    assert [text.startswith(in_float) for text in errors] == [True] * (op == "ConvTranspose")
    (node,) = (n for n in onnx.load(done.files["model"]).graph.node if n.name == "conv")
    assert "auto_pad" not in [a.name for a in node.attribute]


def tensorflow(noise: float = 0.0) -> tuple[Qdq, str]:
    """Weights whose quantization is folded to float, before and behind a pool."""
    net = Qdq([2, 4, 6, 6])
    scale = np.float32([0.011, 0.023, 0.0057, 0.0131]).reshape(-1, 1, 1, 1)
    integers = rng().integers(-127, 128, (4, 4, 3, 3)).astype(np.float32)
    folded = integers * scale + np.float32(noise) * real(4, 4, 3, 3)
    y = net.node("Conv", net.fake("x", 0.05), net.constant(folded), name="conv", pads=[1] * 4)
    pooled = net.node("MaxPool", net.fake(y, 0.5), kernel_shape=[6, 6])
    flat = net.node("Flatten", pooled)
    dense = rng().integers(-90, 91, (3, 4)).astype(np.float32) * np.float32(0.037)
    return net, net.node("Gemm", flat, net.constant(dense), name="dense", transB=1)


def test_float_weights_on_a_grid_are_taken_as_integers_by_option(tmp_path: Path) -> None:
    net, y = tensorflow()
    source = net_file(net, tmp_path, y)
    record = tmp_path / "record.txt"
    done = agreeing(source, X, 1e-4, grid_weights=True, record_file=record)
    assert done.layers == ("conv", "dense")
    assert [note for note in done.notes if "lies on a grid" in note] == [
        "'conv': its float weight lies on a grid and was taken as integers.",
        "'dense': its float weight lies on a grid and was taken as integers.",
    ]
    conv_record, dense_record = parse_record(record.read_text())
    assert conv_record.scale_w == pytest.approx((0.011, 0.023, 0.0057, 0.0131), rel=1e-6)
    # Of multiples of a scale the grid is found of which they are, not a finer one.
    assert all(s / 0.037 == pytest.approx(round(s / 0.037)) for s in dense_record.scale_w)
    assert agreeing(source, X, 1e-4).layers == ()


def test_float_weights_beside_a_grid_stay_float(tmp_path: Path) -> None:
    net, y = tensorflow(noise=1e-5)
    done = agreeing(net_file(net, tmp_path, y), X, 1e-4, grid_weights=True)
    assert done.layers == ("dense",)


# Steps of 0.05 * 0.5 = 0.025: the largest bias has 20 of them. Integers of 2 bits leave room for
# steps 32 times as fine.
@pytest.mark.parametrize(
    ("step", "most", "told"), [(0.5, 127, True), (0.001, 127, False), (0.5, 2, False)]
)
def test_a_bias_on_few_steps_is_told(step: float, most: int, told: bool, tmp_path: Path) -> None:
    net = Qdq([2, 4, 6, 6])
    weight = net.weight(rng().integers(-most, most, (3, 4, 1, 1)), step)
    bias = net.constant(np.float32([0.5, -0.1, 0.0]))
    source = net_file(net, tmp_path, net.node("Conv", net.fake("x", 0.05), weight, bias, name="c"))
    for float_bias in (False, True):
        done = convert_qat_model(source, tmp_path / "out", float_bias=float_bias)
        notes = [note for note in done.notes if "--float-bias" in note]
        assert len(notes) == (told and not float_bias)
        assert all(note.startswith("c: the bias is rounded") for note in notes)


def test_biases_of_few_bit_weights_get_finer_steps_and_all_else_stays(tmp_path: Path) -> None:
    net = Qdq([2, 4, 6, 6])
    integers = rng().integers(-2, 2, (3, 4, 1, 1))
    bias = np.float32([0.513, -0.107, 0.03])
    conv = net.node(
        "Conv", net.fake("x", 0.05), net.weight(integers, 0.5), net.constant(bias), name="c"
    )
    done = agreeing(net_file(net, tmp_path, conv), X, 0.025 / 32 / 2)
    constants = onnx.load(done.files["model"]).graph.initializer
    stored = {constant.name: numpy_helper.to_array(constant) for constant in constants}
    np.testing.assert_array_equal(stored["c.weight"], integers * 32)
    np.testing.assert_array_equal(stored["c.bias"], np.rint(bias * 40 * 32))


def test_float_biases_may_be_an_option_of_the_exporter(tmp_path: Path) -> None:
    net = Qdq([2, 4, 6, 6])
    weight, bias = (
        net.weight(rng().integers(-127, 127, (3, 4, 1, 1)), 0.5),
        net.constant([0.513] * 3, np.float32),
    )
    source = net_file(net, tmp_path, net.node("Conv", net.fake("x", 0.05), weight, bias, name="c"))
    by_argument = convert_qat_model(source, tmp_path / "argument", float_bias=True)
    target = CannExporter(float_bias=True)
    by_option = convert_qat_model(source, tmp_path / "option", target=target)
    plain = convert_qat_model(source, tmp_path / "plain")
    files = [done.files["model"].read_bytes() for done in (by_argument, by_option, plain)]
    assert files[0] == files[1] != files[2]


# A bias of more steps than float32 holds, beside a weight that would have room.
def test_a_bias_far_beyond_int32_is_refused_as_before(tmp_path: Path) -> None:
    net = Qdq([2, 4, 6, 6])
    weight, bias = (
        net.weight(np.ones((3, 4, 1, 1), int), 1e-30),
        net.constant([3e38] * 3, np.float32),
    )
    source = net_file(net, tmp_path, net.node("Conv", net.fake("x", 0.05), weight, bias, name="c"))
    with pytest.raises(UnsupportedByTarget, match="must fit int32"):
        convert_qat_model(source, tmp_path / "out")
