"""A file that is quantized in another form than pairs is told so, with what to do in its tool."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_qat.export.convert_onnx import convert_qat_model
from lightning_qat.export.protocol import UnsupportedByTarget

CONV = helper.make_node("Conv", ["d", "w"], ["y"], name="conv")


def node(op_type: str, inputs: str, outputs: str, domain: str = "", **options: Any) -> Any:
    return helper.make_node(
        op_type, inputs.split(), outputs.split(), name=op_type.lower(), domain=domain, **options
    )


FILES: dict[str, tuple[list[Any], str]] = {
    "FP8 of TensorRT": (
        [
            node("TRT_FP8QuantizeLinear", "x s", "q", "trt"),
            node("TRT_FP8DequantizeLinear", "q s", "d", "trt"),
            CONV,
        ],
        r"TensorRT's own .*'trt_fp8quantizelinear' \(TRT_FP8.*INT8_DEFAULT_CFG",
    ),
    "FakeQuantize of NNCF": (
        [node("FakeQuantize", "x s s s s", "d", "org.openvinotoolkit", levels=256), CONV],
        r"OpenVINO's FakeQuantize.*nncf\.strip\(model\)",
    ),
    "Quant of QONNX": (
        [node("Quant", "x s s s", "d", "qonnx.custom_op.general"), CONV],
        r"QONNX's Quant.*export_onnx_qcdq",
    ),
    "operators on integers": (
        [
            node("QuantizeLinear", "x s z", "q"),
            node("QLinearConv", "q s z w8 s z s z", "p"),
            node("DequantizeLinear", "p s z", "y"),
        ],
        r"QOperator format.*'qlinearconv' \(QLinearConv\).*quant_format=QuantFormat\.QDQ",
    ),
    "ranges at run time": (
        [
            node("DynamicQuantizeLinear", "x", "q qs qz"),
            node("ConvInteger", "q w8 qz", "i"),
            node("Cast", "i", "y", to=TensorProto.FLOAT),
        ],
        r"dynamic quantization.*Quantize statically(.|\n)*QOperator format.*convinteger",
    ),
}


def saved(nodes: list[Any], folder: Path) -> Path:
    constants = {
        "w": np.ones((4, 4, 3, 3), np.float32),
        "w8": np.ones((4, 4, 3, 3), np.int8),
        "s": np.float32(0.1),
        "z": np.int8(0),
    }
    tensors = [
        numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()
    ]
    tensors.append(helper.make_tensor("z8", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    domains = {n.domain for n in nodes} - {""}
    opsets = [helper.make_opsetid("", 19), *(helper.make_opsetid(d, 1) for d in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "net.onnx")
    return folder / "net.onnx"


@pytest.mark.parametrize("form", FILES)
def test_another_form_of_quantization_is_named_with_its_tool_s_remedy(
    form: str, tmp_path: Path
) -> None:
    nodes, message = FILES[form]
    with pytest.raises(ValueError, match=message) as raised:
        convert_qat_model(saved(nodes, tmp_path), tmp_path / "out")
    assert "float model" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_pairs_of_fp8_are_told_to_be_integers(tmp_path: Path) -> None:
    nodes = [node("QuantizeLinear", "x s z8", "q"), node("DequantizeLinear", "q s z8", "d"), CONV]
    with pytest.raises(UnsupportedByTarget, match=r"got float8_e4m3fn.*mtq\.INT8_DEFAULT_CFG"):
        convert_qat_model(saved(nodes, tmp_path), tmp_path / "out")


def test_a_float_model_is_called_one(tmp_path: Path) -> None:
    nodes = [node("Relu", "x", "d"), CONV]
    with pytest.raises(ValueError, match=r"is a float model\. Train it with quantization first"):
        convert_qat_model(saved(nodes, tmp_path), tmp_path / "out")
