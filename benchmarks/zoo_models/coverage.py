"""What a file computes on integers, counted in the file itself, by code of the zoo's own.

Products are convolutions and matrix products. In ONNX files one is integer if what it multiplies
comes from integers: through DequantizeLinear and operators that move values in QDQ files, from
AscendQuant and int8 weights in deploy files. In TFLite files it is integer if what it reads is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Attention"})
_MOVES = frozenset(
    "Reshape Transpose Squeeze Unsqueeze Flatten Slice Gather Split Expand Tile Identity Concat "
    "Pad Relu MaxPool".split()
)
_OPTIMIZED_FLOAT = PRODUCTS | {"FusedConv", "FusedMatMul", "FusedGemm", "NhwcFusedConv"}
_TFLITE = frozenset(
    "CONV_2D DEPTHWISE_CONV_2D CONV_3D TRANSPOSE_CONV FULLY_CONNECTED BATCH_MATMUL".split()
)


class Products(NamedTuple):
    """Products of one file.

    Args:
        integer: How many are integer.
        floats: Names of those that are not.
    """

    integer: int
    floats: tuple[str, ...]


def _graph_products(path: Path, integers: frozenset[str]) -> Products:
    """Products of an ONNX file whose operands come from nodes of some types, or do not."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    made_by = {name: node for node in graph.node for name in node.output}
    integer_weights = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.INT8}

    def comes_from_integers(name: str) -> bool:
        if name in integer_weights:
            return True
        node = made_by.get(name)
        while node is not None and node.op_type in _MOVES and node.input[0] in made_by:
            node = made_by[node.input[0]]
        return node is not None and (
            node.op_type in integers
            or (node.op_type in _MOVES and node.input[0] in integer_weights)
        )

    whole, floats = 0, list[str]()
    for node in graph.node:
        if node.op_type in PRODUCTS:
            if all(comes_from_integers(name) for name in node.input[:2]):
                whole += 1
            else:
                floats.append(node.name)
    return Products(whole, tuple(floats))


def qdq_products(path: Path) -> Products:
    """Products of a QDQ file."""
    return _graph_products(path, frozenset({"DequantizeLinear"}))


def deploy_products(path: Path) -> Products:
    """Products of a deploy file for Ascend."""
    return _graph_products(path, frozenset({"AscendQuant"}))


def optimized_products(path: Path) -> Mapping[str, int]:
    """Operators of ONNX Runtime's optimized session that compute products, and how many."""
    import onnx
    import onnxruntime as ort

    written = path.with_suffix(".optimized.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(written)
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(written, load_external_data=False).graph.node
    counts: dict[str, int] = {}
    for node in nodes:
        if (
            node.op_type in _OPTIMIZED_FLOAT
            or "Integer" in node.op_type
            or "QLinear" in node.op_type
        ):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    written.unlink()
    return counts


def is_float_product(operator: str) -> bool:
    """Whether an operator of an optimized session multiplies in float."""
    return operator in _OPTIMIZED_FLOAT


def tflite_products(path: Path) -> Products:
    """Products of a TFLite file."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    interpreter: Any = Interpreter(
        str(path), experimental_op_resolver_type=_reference(), num_threads=1
    )
    tensors = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    whole, floats = 0, list[str]()
    for operator in interpreter._get_ops_details():
        if operator["op_name"] not in _TFLITE:
            continue
        read = [tensors[i]["dtype"] for i in operator["inputs"][:2] if i in tensors]
        if operator["op_name"] == "TRANSPOSE_CONV":
            read = [tensors[i]["dtype"] for i in operator["inputs"][1:3]]
        if any(dtype == np.float32 for dtype in read):
            name = tensors[operator["outputs"][0]]["name"]
            floats.append(f"{operator['op_name']} {name}")
        else:
            whole += 1
    return Products(whole, tuple(floats))


def _reference() -> Any:
    """Operators as the file has them, not a delegate's."""
    from ai_edge_litert.interpreter import OpResolverType

    return OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
