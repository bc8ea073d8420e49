"""Quantized ONNX models of any tool, brought to Ascend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lightning_qat import Conversion, convert_qat_model
from lightning_qat.amct.record import parse_record
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.cann import AscendExecutor
from lightning_qat_exporters.onnx_files.write import write_onnx
from tests.exporters.cann.amct_goldens import GOLDENS
from tests.exporters.cann.qdq_files import net_file, saved
from tests.exporters.cann.qdq_graphs import Qdq, f32, proto

Array = NDArray[Any]

RUNTIME = tuple(map(int, ort.__version__.split(".")[:2]))
NEWEST_OPSET = min(onnx.defs.onnx_opset_version(), 23 if RUNTIME >= (1, 23) else 22)
"""What both onnx and ONNX Runtime take."""


def run(path: Path, inputs: dict[str, Array]) -> list[Array]:
    """ONNX Runtime as the file is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, inputs)]


def agreeing(
    source: Path, inputs: dict[str, Array], atol: float = 1e-6, **options: Any
) -> Conversion:
    """Convert, and check that both files compute what ONNX Runtime makes of the source."""
    done = convert_qat_model(source, source.parent / "net", **options)
    expected = run(source, inputs)
    deployed = AscendExecutor(done.files["model"]).run(inputs)
    simulated = run(done.files["fake_quant"], inputs)
    for want, *got in zip(expected, deployed, simulated, strict=True):
        for found in got:
            assert found.shape == want.shape
            np.testing.assert_allclose(
                found.astype(np.float64), want.astype(np.float64), rtol=0, atol=atol
            )
    return done


def ops(done: Conversion) -> list[str]:
    return [node.op_type for node in onnx.load(done.files["model"]).graph.node]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def real(*shape: int) -> Array:
    return rng().normal(size=shape).astype(np.float32)


# ----------------------------------------------------------------------------------------------
# AMCT's own intermediate models


@pytest.mark.parametrize(
    "name", ["conv_arq_cw", "conv_arq_pt", "conv_ulq_cw", "linear_arq", "linear3d_arq"]
)
def test_amcts_own_intermediate_models_convert(name: str, tmp_path: Path) -> None:
    folder = GOLDENS / "single_op"
    arrays = np.load(folder / f"{name}_io.npz")
    source = folder / f"{name}_inter.onnx"
    record = tmp_path / "record.txt"
    done = convert_qat_model(source, tmp_path / "out", record, float_bias=True)
    executor = AscendExecutor(done.files["model"])
    inputs = {executor.input_names[0]: arrays["in0"]}
    np.testing.assert_allclose(executor.run(inputs)[0], arrays["out0"], rtol=0, atol=1e-5)
    simulated = run(done.files["fake_quant"], inputs)[0]
    np.testing.assert_allclose(simulated, arrays["out0"], rtol=0, atol=1e-5)
    assert (len(done.layers), done.left_float) == (1, ())
    (entry,) = parse_record(record.read_text())
    assert entry.name == done.layers[0]

    # An int32 bias moves an output by half a step of the accumulator at most.
    done = convert_qat_model(source, tmp_path / "out")
    step = entry.scale_d * max(entry.scale_w)
    (rounded,) = AscendExecutor(done.files["model"]).run(inputs)
    np.testing.assert_allclose(rounded, arrays["out0"], rtol=0, atol=step / 2 + 1e-5)


# ----------------------------------------------------------------------------------------------
# Layers, and the forms of their weights

LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "conv1d": ("Conv", (2, 4, 9), (6, 2, 3), {"group": 2, "pads": [1, 1]}),
    "conv2d": ("Conv", (2, 4, 6, 5), (6, 4, 3, 2), {"strides": [2, 1]}),
    "conv3d": ("Conv", (1, 2, 4, 5, 4), (3, 2, 2, 3, 2), {"dilations": [1, 2, 1]}),
    "conv_transpose": ("ConvTranspose", (2, 4, 5, 4), (4, 3, 3, 2), {"strides": [2, 1]}),
    "grouped_transpose": ("ConvTranspose", (2, 4, 5), (4, 3, 3), {"group": 2, "pads": [1, 0]}),
    "gemm": ("Gemm", (3, 5), (5, 4), {}),
    "gemm_transposed": ("Gemm", (3, 5), (4, 5), {"transB": 1}),
    "matmul": ("MatMul", (2, 3, 5), (5, 4), {}),
}


def channel_axis(layer: str) -> int:
    op_type, _, _, attributes = LAYERS[layer]
    return 0 if op_type == "Conv" or attributes.get("transB") else 1


def weight_of(net: Qdq, layer: str, form: str, dtype: Any, per_channel: bool) -> str:
    """A weight in one of the forms that tools write it in."""
    shape = LAYERS[layer][2]
    axis = channel_axis(layer)
    generator = rng()
    scale = f32(generator.uniform(0.01, 0.02, shape[axis] if per_channel else ()))
    zero = np.full(scale.shape, 128 if dtype == np.uint8 else 0, dtype)
    integers = generator.integers(-127, 128, shape) + int(zero.flat[0])
    along = scale.reshape([-1 if a == axis else 1 for a in range(len(shape))] if scale.ndim else ())
    values = f32((integers - int(zero.flat[0])) * along)
    order = list(range(len(shape)))
    order[0], order[1] = 1, 0
    factors = [net.constant(scale), net.constant(zero, dtype)]
    swapped = {"axis": 1 - axis} if scale.ndim else {}
    options = {"axis": axis} if scale.ndim else {}
    if form == "integers":
        return net.node("DequantizeLinear", net.constant(integers, dtype), *factors, **options)
    if form == "float":
        quantized = net.node("QuantizeLinear", net.constant(values), *factors, **options)
        return net.node("DequantizeLinear", quantized, *factors, **options)
    if form == "transposed before":
        moved = net.node("Transpose", net.constant(values.transpose(order)), perm=order)
        quantized = net.node("QuantizeLinear", moved, *factors, **options)
        return net.node("DequantizeLinear", quantized, *factors, **options)
    if form == "transposed after":
        stored = net.constant(integers.transpose(order), dtype)
        moved = net.node("DequantizeLinear", stored, *factors, **swapped)
        return net.node("Transpose", moved, perm=order)
    assert form == "identity and cast between"
    half = net.node("Cast", net.constant(values), to=TensorProto.FLOAT)
    quantized = net.node("QuantizeLinear", net.node("Identity", half), *factors, **options)
    back = net.node("DequantizeLinear", net.node("Identity", quantized), *factors, **options)
    return net.node("Cast", net.node("Identity", back), to=TensorProto.FLOAT)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *(("integers", np.int8), ("integers", np.uint8), ("float", np.int8)),
        *(("transposed before", np.int8), ("transposed after", np.uint8)),
        ("identity and cast between", np.int8),
    ],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_in_every_form_of_weight(
    layer: str, form: str, dtype: Any, per_channel: bool, tmp_path: Path
) -> None:
    op_type, shape, weight_shape, attributes = LAYERS[layer]
    net = Qdq(shape, opset=18)
    data = net.fake("x", 0.03, 7 + (128 if dtype == np.uint8 else 0), dtype)
    weight = weight_of(net, layer, form, dtype, per_channel)
    channels = weight_shape[channel_axis(layer)] * (
        attributes.get("group", 1) if op_type == "ConvTranspose" else 1
    )
    bias = [] if op_type == "MatMul" else [net.constant(f32(rng().normal(size=channels)))]
    y = net.node(op_type, data, weight, *bias, name="layer", **attributes)
    source = net_file(net, tmp_path, net.fake(net.node("Relu", y), 0.05, 0, dtype))
    # One step of the output: the bias is rounded to the accumulator's grid.
    done = agreeing(source, {"x": real(*shape)}, atol=0.0501)
    assert (done.layers, done.left_float) == (("layer",), ())
    layer_ops = [op for op in ops(done) if op == op_type or op.startswith("Ascend")]
    assert layer_ops == [
        *("AscendQuant", op_type, "AscendDequant", "AscendQuant", "AscendAntiQuant")
    ]
    agreeing(source, {"x": real(*shape)}, atol=1e-5, float_bias=True)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_weight_whose_zero_point_leaves_int8_is_split_exactly(
    layer: str, per_channel: bool, tmp_path: Path
) -> None:
    op_type, shape, weight_shape, attributes = LAYERS[layer]
    axis = channel_axis(layer)
    size = weight_shape[axis] if per_channel else 1
    net = Qdq(shape)
    zeros = np.resize([30, 250, 128], size).astype(np.uint8)
    factors = [
        net.constant(f32(np.linspace(0.01, 0.02, size)).reshape([-1] if per_channel else []))
    ]
    factors.append(net.constant(zeros.reshape([-1] if per_channel else [])))
    integers = rng().integers(0, 256, weight_shape).astype(np.uint8)
    weight = net.node("DequantizeLinear", net.constant(integers), *factors, axis=axis)
    data = net.fake("x", 0.03, 7)
    source = net_file(net, tmp_path, net.node(op_type, data, weight, name="layer", **attributes))
    done = agreeing(source, {"x": real(*shape)}, atol=2e-4)
    assert done.layers == ("layer",)
    assert done.notes == (
        "'layer': its weight's zero point takes it out of int8; the layer 'layer.shift' adds the "
        "rest, exactly.",
    )


# ----------------------------------------------------------------------------------------------
# What stands around layers


@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv_transpose", "gemm_transposed"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_batch_norm_is_folded_into_the_integers(
    layer: str, per_channel: bool, tmp_path: Path
) -> None:
    op_type, shape, weight_shape, attributes = LAYERS[layer]
    channels = weight_shape[channel_axis(layer)]
    net = Qdq(shape)
    weight = weight_of(net, layer, "integers", np.int8, per_channel)
    bias = net.constant(f32(np.linspace(-1, 1, channels)))
    y = net.node(op_type, net.fake("x", 0.03, 7), weight, bias, name="layer", **attributes)
    gamma, beta = f32(np.linspace(-2, 1.9, channels)), f32(np.linspace(1, 2, channels))
    mean, var = f32(np.linspace(-1, 0, channels)), f32(np.linspace(0.5, 1.5, channels))
    statistics = [net.constant(a) for a in (gamma, beta, mean, var)]
    y = net.node("BatchNormalization", y, *statistics, epsilon=1e-3)
    source = net_file(net, tmp_path, net.node("Relu", y))
    record = tmp_path / "record.txt"
    done = agreeing(source, {"x": real(*shape)}, atol=2e-5, float_bias=True, record_file=record)
    assert "BatchNormalization" not in ops(done)
    # The record has the scales after folding.
    (entry,) = parse_record(record.read_text())
    assert len(entry.scale_w) == channels


def test_a_batch_norm_stays_where_folding_is_not_exact(tmp_path: Path) -> None:
    net = Qdq([1, 1, 2, 2])
    weight = net.weight([[[[-128]]], [[[5]]]], 0.5)
    y = net.node("Conv", net.fake("x", 0.25), weight, name="conv")
    ones = net.constant(f32([1, 1]))
    y = net.node("BatchNormalization", y, net.constant(f32([-1, 1])), ones, ones, ones)
    done = agreeing(net_file(net, tmp_path, y), {"x": real(1, 1, 2, 2)}, atol=1e-5)
    assert ops(done)[-1] == "BatchNormalization"


@pytest.mark.parametrize("move", ["MaxPool", "Flatten", "Pad", "Transpose"])
def test_a_grid_is_carried_to_a_layer_behind_what_only_moves_values(
    move: str, tmp_path: Path
) -> None:
    net = Qdq([1, 2, 4, 4])
    y = net.node("Relu", net.fake("x", 0.05, -20))
    if move == "MaxPool":
        y = net.node(move, y, kernel_shape=[2, 2], pads=[1, 1, 1, 1])
    elif move == "Pad":
        y = net.node(move, y, net.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    elif move == "Transpose":
        y = net.node(move, y, perm=[0, 1, 3, 2])
    if move == "Flatten":
        y = net.node(move, y)
        y = net.node("Gemm", y, net.weight(rng().integers(-9, 9, (3, 32)), 0.5), name="l", transB=1)
    else:
        y = net.node("Conv", y, net.weight(rng().integers(-9, 9, (3, 2, 3, 3)), 0.5), name="l")
    done = agreeing(net_file(net, tmp_path, y), {"x": real(1, 2, 4, 4)}, atol=1e-5)
    assert done.layers == ("l",)


def test_joins_and_integer_outputs_are_taken(tmp_path: Path) -> None:
    net = Qdq([2, 3])
    left, right = net.fake("x", 0.5, 3), net.fake(net.node("Sigmoid", "x"), 1 / 256, 0, np.uint8)
    one = net.node("Add", left, net.node("Neg", "x"), name="one input")
    both = net.node("Add", one, right, name="both inputs")
    cat = net.node("Concat", left, right, name="cat", axis=0)
    integers = net.node(
        "QuantizeLinear", both, net.constant(f32(0.1)), net.constant(5, np.int8), name="q"
    )
    model = proto(net.model(cat, integers))
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.INT8
    done = agreeing(saved(model, tmp_path), {"x": real(2, 3)})
    assert set(done.joins) == {"one input", "both inputs", "cat"}
    assert (done.layers, done.outputs) == ((), ("y1",))


def half_net(casts: bool) -> Qdq:
    """A float16 network: pairs in float16, or in float32 between casts."""
    net = Qdq([1, 2, 4, 4], opset=19)
    real_type = np.float32 if casts else np.float16
    half = TensorProto.FLOAT16

    def fake(x: str, scale: float) -> str:
        factors = [net.constant(scale, real_type), net.constant(3, np.int8)]
        x = net.node("Cast", x, to=TensorProto.FLOAT) if casts else x
        x = net.node("DequantizeLinear", net.node("QuantizeLinear", x, *factors), *factors)
        return net.node("Cast", x, to=half) if casts else x

    weight = net.node(
        "DequantizeLinear",
        net.constant(rng().integers(-9, 9, (3, 2, 3, 3)), np.int8),
        net.constant(np.full(3, 0.125), real_type),
        axis=0,
    )
    weight = net.node("Cast", weight, to=half) if casts else weight
    x = net.node("Cast", "x", to=half)
    bias = net.constant([1, 0.5, -1], np.float16)
    y = net.node("Relu", net.node("Conv", fake(x, 0.0625), weight, bias, name="conv"))
    net.node("Cast", net.node("Add", fake(y, 0.25), y, name="join"), to=TensorProto.FLOAT)
    return net


ROUNDS_HALVES = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 30)


@pytest.mark.parametrize("casts", [False, True])
def test_float16_networks_stay_float16_between_the_integers(casts: bool, tmp_path: Path) -> None:
    if not casts and not ROUNDS_HALVES:
        pytest.skip("this ONNX Runtime cuts float16 off where QuantizeLinear rounds")
    net = half_net(casts)
    # Two float16 results around 8 apart by an ulp, 2**-7, and a step of 0.25 on top.
    done = agreeing(
        net_file(net, tmp_path, f"v{len(net.nodes) - 1}"), {"x": real(1, 2, 4, 4)}, atol=0.26
    )
    assert (done.layers, done.joins) == (("conv",), ("join",))
    (dequant,) = (
        n for n in onnx.load(done.files["model"]).graph.node if n.op_type == "AscendDequant"
    )
    assert helper.get_node_attr_value(dequant, "dtype") == 1


@pytest.mark.parametrize("opset", [o for o in (10, 11, 13, 17, 19, 21, 23) if o <= NEWEST_OPSET])
def test_every_opset_with_quantizelinear(opset: int, tmp_path: Path) -> None:
    net = Qdq([1, 2, 4, 4], opset)
    integers = net.constant(rng().integers(-9, 9, (3, 2, 3, 3)), np.int8)
    factors = [net.constant(0.5, np.float32), net.constant(0, np.int8)]
    weight = net.node("DequantizeLinear", integers, *factors)
    y = net.node("Conv", net.fake("x", 0.0625, 4), weight, name="conv")
    bounds = {"min": 0.0, "max": 6.0}
    if opset == 10:
        y = net.node("Clip", y, **bounds)
    else:
        y = net.node("Clip", y, *(net.constant(b, np.float32) for b in bounds.values()))
    done = agreeing(net_file(net, tmp_path, net.fake(y, 0.25)), {"x": real(1, 2, 4, 4)})
    assert onnx.load(done.files["model"]).opset_import[0].version == 11
    assert done.layers == ("conv",)


def test_scales_may_be_shared_and_constants_may_be_nodes(tmp_path: Path) -> None:
    net = Qdq([2, 3])
    shared = [
        net.node("Constant", value=numpy_helper.from_array(a)) for a in (f32(0.5), np.int8(0))
    ]
    q = net.node("DequantizeLinear", net.node("QuantizeLinear", "x", *shared), *shared)
    stored = net.node(
        "Constant", value=numpy_helper.from_array(np.arange(12, dtype=np.int8).reshape(3, 4))
    )
    weight = net.node("DequantizeLinear", stored, *shared)
    done = agreeing(
        net_file(net, tmp_path, net.node("MatMul", q, weight, name="fc")), {"x": real(2, 3)}
    )
    assert done.layers == ("fc",)


def test_subgraphs_are_left_alone(tmp_path: Path) -> None:
    net = Qdq([2, 2])
    y = net.node("MatMul", net.fake("x", 0.5), net.weight([[1, 2], [3, 4]], 0.5), name="fc")
    branches = {
        branch: helper.make_graph(
            [helper.make_node(op_type, [y], [f"{branch}_y"], name=branch)],
            branch,
            [],
            [helper.make_tensor_value_info(f"{branch}_y", TensorProto.FLOAT, None)],
        )
        for branch, op_type in (("then_branch", "Relu"), ("else_branch", "Neg"))
    }
    chosen = net.node("If", net.constant(True), **branches)
    done = agreeing(net_file(net, tmp_path, chosen), {"x": real(2, 2)})
    assert done.layers == ("fc",)


def test_external_data_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Qdq([1, 40])
    weight = net.weight(rng().integers(-9, 9, (40, 50)), 0.5)
    model = proto(net.model(net.node("MatMul", net.fake("x", 0.5), weight, name="fc")))
    path = tmp_path / "qat.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    monkeypatch.setitem(write_onnx.__kwdefaults__, "external_above", 1000)
    done = agreeing(path, {"x": real(1, 40)})
    assert {"model_weights", "fake_quant_weights"} <= set(done.files)
    assert set(done.files.values()) | {path, tmp_path / "w.bin"} == set(tmp_path.iterdir())
    findings = CannExporter().lint(done.files["model"])
    assert not [finding for finding in findings if finding.severity == "error"]


def chain(*names: str) -> Qdq:
    net = Qdq([1, 2])
    y = "x"
    for name in names:
        weight = net.weight([[1, 2], [3, -4]], 0.25)
        y = net.node("MatMul", net.fake(y, 0.5), weight, name=name)
        y = net.node("Relu", y, name=f"{name}.quant")
    return net


def test_names_that_collide_or_are_no_identifiers_are_made_unique(tmp_path: Path) -> None:
    names = ("a/b:c d", "a/b:c d", "", "a/b:c d.quant")
    source = net_file(chain(*names), tmp_path, "v19")
    done = convert_qat_model(source, tmp_path / "out")
    assert len(set(done.layers)) == 4
    graph = onnx.load(done.files["model"]).graph
    written = [node.name for node in graph.node]
    assert len(set(written)) == len(written)
    # ONNX Runtime takes no two nodes of one name, so the reference has others.
    (expected,) = run(net_file(chain(*"abcd"), tmp_path, "v19"), {"x": real(1, 2)})
    (actual,) = AscendExecutor(done.files["model"]).run({"x": real(1, 2)})
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias_first", [False, True])
@pytest.mark.parametrize("shape", [(5,), (1, 1, 5)])
def test_a_quantized_bias_of_a_linear_on_three_dimensions_is_the_layers(
    bias_first: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    net = Qdq([2, 3, 4])
    weight = net.weight(rng().integers(-9, 9, (4, 5)), np.full(5, 0.5), axis=1)
    bias = net.node(
        "DequantizeLinear",
        net.constant(np.arange(5).reshape(shape), np.int32),
        net.constant(0.125, np.float32),
    )
    y = net.node("MatMul", net.fake("x", 0.25), weight, name="fc")
    y = net.node("Add", *((bias, y) if bias_first else (y, bias)), name="/fc/Add")
    done = agreeing(net_file(net, tmp_path, y), {"x": real(2, 3, 4)})
    assert (done.layers, done.left_float) == (("fc",), ())


def test_the_conversion_prints_what_stayed_real_and_why(tmp_path: Path) -> None:
    net = Qdq([1, 2])
    y = net.node("MatMul", net.fake("x", 0.5), net.weight([[1, 2], [3, 4]], 0.5), name="fc")
    y = net.node("MatMul", y, net.constant(f32(np.eye(2))), name="plain")
    done = agreeing(net_file(net, tmp_path, y), {"x": real(1, 2)})
    first, second, *files = str(done).splitlines()
    assert first == (
        "1 layers on integers, 0 other readers of quantized tensors, 0 integer outputs, 1 left real"
    )
    assert second == "  left real: 'plain': neither its input nor its weight is quantized."
    assert files == [f"  {role}: {path}" for role, path in done.files.items()]
