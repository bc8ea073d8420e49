"""Quantization that is written otherwise than as QuantizeLinear and DequantizeLinear pairs.

Each row says what a file has and what to do in the tool that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import onnx
import onnx_ir as ir


class Foreign(NamedTuple):
    """One way to write quantization.

    Args:
        what: What the file has.
        remedy: What to do in the tool that wrote it.
    """

    what: str
    remedy: str


_QOPERATOR = Foreign(
    "operators on integers (ONNX Runtime's QOperator format)",
    "Quantize with quantize_static(..., quant_format=QuantFormat.QDQ); do not save what a session "
    "has optimized",
)
_DYNAMIC = Foreign(
    "dynamic quantization, whose ranges are found at run time",
    "Quantize statically: quantize_static(..., quant_format=QuantFormat.QDQ), or train with "
    "quantization",
)
_TENSORRT = Foreign(
    "TensorRT's own quantizers of FP8, FP4 or INT4 (ModelOpt)",
    "Quantize with 8-bit integers in ModelOpt (mtq.INT8_DEFAULT_CFG), which exports QuantizeLinear",
)
_OPENVINO = Foreign(
    "OpenVINO's FakeQuantize (NNCF)",
    "Call nncf.strip(model) before torch.onnx.export, or export with save_format='onnx_13', which "
    "writes QuantizeLinear",
)
_QONNX = Foreign(
    "QONNX's Quant nodes (Brevitas, FINN)",
    "Export with brevitas.export.export_onnx_qcdq",
)

_BY_DOMAIN: Mapping[str, Foreign] = {
    "trt": _TENSORRT,
    "org.openvinotoolkit": _OPENVINO,
    "qonnx.custom_op.general": _QONNX,
    "finn.custom_op.general": _QONNX,
    "onnx.brevitas": _QONNX,
}
_BY_TYPE: Mapping[str, Foreign] = {
    "DynamicQuantizeLinear": _DYNAMIC,
    "DynamicQuantizeMatMul": _DYNAMIC,
    "DynamicQuantizeLSTM": _DYNAMIC,
    "ConvInteger": _QOPERATOR,
    "MatMulInteger": _QOPERATOR,
    "MatMulIntegerToFloat": _QOPERATOR,
    "QGemm": _QOPERATOR,
    "QAttention": _QOPERATOR,
}
_SHOWN = 3


def foreign_quantizer(node: ir.Node | onnx.NodeProto) -> Foreign | None:
    """How a node quantizes, if not by QuantizeLinear and DequantizeLinear."""
    if node.domain in _BY_DOMAIN and "Quant" in node.op_type:
        return _BY_DOMAIN[node.domain]
    if node.domain in ("", "com.microsoft"):
        if node.op_type.startswith("QLinear"):
            return _QOPERATOR
        return _BY_TYPE.get(node.op_type)
    return None


def foreign_quantization(nodes: Iterable[ir.Node | onnx.NodeProto]) -> str | None:
    """What else than pairs a file quantizes with, and the remedy for each; ``None``: nothing."""
    found: dict[Foreign, list[str]] = {}
    for node in nodes:
        foreign = foreign_quantizer(node)
        if foreign is not None:
            outputs = node.output if isinstance(node, onnx.NodeProto) else node.outputs
            first = next(iter(outputs), None)
            name = node.name or (first if isinstance(first, str) else first and first.name)
            found.setdefault(foreign, []).append(f"{name or node.op_type!r} ({node.op_type})")
    if not found:
        return None
    lines = []
    for foreign, names in found.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"  {foreign.what}: {', '.join(names[:_SHOWN])}{more}. {foreign.remedy}.")
    return "\n".join(lines)
