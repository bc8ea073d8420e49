"""ONNX Runtime before 1.30 cuts off where QuantizeLinear of float16 rounds: up to a step."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import TensorProto

from lightning_qat.export.protocol import CannotRun

_FIRST_THAT_ROUNDS = (1, 30)
"""Measured: 1.22 to 1.29 give 0 for a float16 of 0.75 steps, on every grid; 1.30 gives 1."""


def refuse_cut_halves(file: Path | bytes) -> None:
    """Refuse a file whose float16 the installed ONNX Runtime would quantize wrongly.

    Args:
        file: The ONNX file, or its bytes.

    Raises:
        CannotRun: It quantizes float16, and ONNX Runtime is older than 1.30.
    """
    installed = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if installed >= _FIRST_THAT_ROUNDS:
        return
    proto = (
        onnx.load_model_from_string(file)
        if isinstance(file, bytes)
        else onnx.load(file, load_external_data=False)
    )
    halves = _float16_values(proto.graph)
    found = [
        node.name or node.output[0]
        for node in proto.graph.node
        if node.op_type == "QuantizeLinear" and not halves.isdisjoint(node.input[:2])
    ]
    if found:
        raise CannotRun(
            "onnxruntime",
            f"version {ort.__version__} cuts off where QuantizeLinear of float16 must round "
            f"({found[0]!r}{f' and {len(found) - 1} more' if found[1:] else ''}). Install "
            "onnxruntime>=1.30, which needs Python 3.11",
        )


def _float16_values(graph: onnx.GraphProto) -> set[str]:
    """Names that are known to be float16 without inferring types: a scale nearly always is."""
    half = TensorProto.FLOAT16
    values = (*graph.input, *graph.output, *graph.value_info)
    names = {v.name for v in values if v.type.tensor_type.elem_type == half}
    names |= {tensor.name for tensor in graph.initializer if tensor.data_type == half}
    for node in graph.node:
        for attribute in node.attribute:
            constant = node.op_type == "Constant" and attribute.t.data_type == half
            if constant or (node.op_type, attribute.name, attribute.i) == ("Cast", "to", half):
                names.update(node.output)
    return names
