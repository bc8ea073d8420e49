"""A model's own functions are checked like its graph: ONNX Runtime refuses what is refused here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lightning_qat import convert_qat_model
from lightning_qat.export.protocol import CannotExpress
from lightning_qat_exporters.onnx_files.read import load_proto

IMPORTS = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]


def model(call: NodeProto | None = None) -> ModelProto:
    """``y = pair(x) @ w``, where a function has the pair; its zero point may be left out."""
    call = call or helper.make_node("Pair", ["x", "s"], ["d"], "pair", domain="own")
    body = [
        helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["q"], "first"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["b"], "second"),
    ]
    function = helper.make_function("own", "Pair", ["a", "scale", "zero"], ["b"], body, IMPORTS)
    graph = helper.make_graph(
        [
            call,
            helper.make_node("DequantizeLinear", ["w", "s"], ["v"], "weight"),
            helper.make_node("MatMul", ["d", "v"], ["y"], "fc"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [
            numpy_helper.from_array(np.float32(0.5), "s"),
            numpy_helper.from_array(np.array([[1, 2], [3, 4]], np.int8), "w"),
        ],
    )
    return helper.make_model(graph, functions=[function], opset_imports=IMPORTS, ir_version=10)


def saved(proto: ModelProto, folder: Path) -> Path:
    path = folder / "qat.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def quiet() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def test_a_call_that_leaves_out_an_optional_input_is_converted(tmp_path: Path) -> None:
    """``x`` is [0.6, -0.3], in uint8 steps of 0.5 [1, 0]; so ``y`` is [1, 0] / 2 @ w / 2."""
    source = saved(model(), tmp_path)
    converted = convert_qat_model(source, tmp_path / "net").files["fake_quant"]
    x = np.array([[0.6, -0.3]], np.float32)
    for path in (source, converted):
        session = ort.InferenceSession(str(path), quiet())
        (y,) = session.run(None, {session.get_inputs()[0].name: x})
        np.testing.assert_array_equal(y, [[0.25, 0.5]])


def test_a_call_that_leaves_out_what_its_function_needs_is_refused(tmp_path: Path) -> None:
    source = saved(model(helper.make_node("Pair", ["x"], ["d"], "pair", domain="own")), tmp_path)
    with pytest.raises((ValueError, CannotExpress), match=r"QuantizeLinear\) must have its input"):
        convert_qat_model(source, tmp_path / "net")
    with pytest.raises(Exception, match="INVALID_GRAPH"):
        ort.InferenceSession(str(source), quiet())


def unnamed_output(proto: ModelProto) -> None:
    proto.functions[0].output[0] = ""


def unnamed_input(proto: ModelProto) -> None:
    proto.functions[0].input.append("")


def nothing_made(proto: ModelProto) -> None:
    proto.functions[0].output[0] = "c"


def input_given_back(proto: ModelProto) -> None:
    proto.functions[0].output[0] = "a"


def unsorted(proto: ModelProto) -> None:
    nodes = list(reversed(proto.functions[0].node))
    del proto.functions[0].node[:]
    proto.functions[0].node.extend(nodes)


def read_from_outside(proto: ModelProto) -> None:
    proto.functions[0].node[1].input[1] = "s"


def more_inputs(proto: ModelProto) -> None:
    proto.graph.node[0].input.extend(["", "s"])


def more_outputs(proto: ModelProto) -> None:
    proto.graph.node[0].output.append("e")


def unnamed_output_of_the_graph(proto: ModelProto) -> None:
    proto.graph.output.add(name="").type.tensor_type.elem_type = TensorProto.FLOAT


def reference_outside(proto: ModelProto) -> None:
    proto.graph.node[1].attribute.add(name="axis", ref_attr_name="length", type=2)


def reference_to_nothing(proto: ModelProto) -> None:
    proto.functions[0].node[1].attribute.add(name="axis", ref_attr_name="length", type=2)


BROKEN: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "unnamed output": (unnamed_output, r"output must have a name; one of the function 'Pair' of"),
    "unnamed input": (unnamed_input, r"input must have a name; one of the function 'Pair' of"),
    "nothing made": (nothing_made, r"Nothing in the function 'Pair' of .* makes the output 'c'"),
    "input given back": (input_given_back, r"gives its input 'a' back. Write an Identity node"),
    "unsorted": (unsorted, r"In the function 'Pair' .* reads the tensor 'q', .* makes only later"),
    "more inputs": (more_inputs, r"at most the 3 inputs of its function 'own.Pair'.* has 4"),
    "more outputs": (more_outputs, r"at most the 1 outputs of its function .*'pair' .* has 2"),
    "unnamed output of the graph": (unnamed_output_of_the_graph, r"output must have a name"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_function_without_sense_is_refused_as_onnx_runtime_refuses_it(
    fault: str, tmp_path: Path
) -> None:
    break_it, match = BROKEN[fault]
    proto = model()
    load_proto(saved(proto, tmp_path))
    break_it(proto)
    source = saved(proto, tmp_path)
    with pytest.raises(ValueError, match=match):
        load_proto(source)
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        ort.InferenceSession(str(source), quiet())


def test_a_function_that_reads_a_tensor_of_the_graph_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime looks names up where the call stands; onnx's own checker refuses it."""
    proto = model()
    read_from_outside(proto)
    with pytest.raises(ValueError, match=r"'second' .* reads the tensor 's', which nothing makes"):
        load_proto(saved(proto, tmp_path))
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(proto)


def test_an_attribute_refers_to_one_of_its_function(tmp_path: Path) -> None:
    """ONNX Runtime takes others for attributes that are not there."""
    proto = model()
    reference_outside(proto)
    with pytest.raises(ValueError, match=r"'axis' of the node 'weight' .* refers to 'length'"):
        load_proto(saved(proto, tmp_path))
    proto = model()
    reference_to_nothing(proto)
    with pytest.raises(ValueError, match=r"'second' .* in the function 'own.Pair' .*'length'"):
        load_proto(saved(proto, tmp_path))
    proto.functions[0].attribute.append("length")
    load_proto(saved(proto, tmp_path))
    assert convert_qat_model(tmp_path / "qat.onnx", tmp_path / "net").layers == ("fc",)


def test_an_identity_gives_an_input_back(tmp_path: Path) -> None:
    """What the message on an input that is given back advises is taken."""
    proto = model()
    input_given_back(proto)
    proto.functions[0].output[0] = "c"
    proto.functions[0].node.append(onnx.helper.make_node("Identity", ["a"], ["c"]))
    source = saved(proto, tmp_path)
    load_proto(source)
    ort.InferenceSession(str(source), quiet())
