"""Rules for QuantizeLinear and DequantizeLinear themselves: types, zero points, scales, axes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from lightning_qat.export.lint import Finding
from lightning_qat_exporters.fake_quant_onnx.tensorrt_lint.graph import (
    PAIR,
    is_constant,
    name_of,
    readers,
)
from lightning_qat_exporters.onnx_files.graph_writer import array_of

_TYPES = (
    ir.DataType.INT8,
    ir.DataType.INT4,
    ir.DataType.FLOAT8E4M3FN,
)
_SYMMETRIC = (
    "Train with Recipe(activation=ActivationSpec(symmetric=True)) and export with "
    "FakeQuantOnnxExporter(for_runtime='tensorrt')"
)


def pair_findings(graph: ir.Graph) -> Iterator[Finding]:
    """What QuantizeLinear and DequantizeLinear break."""
    for node in graph:
        if node.op_type in PAIR:
            yield from _type(node)
            yield from _zero_point(node)
            yield from _scale(node)
            yield from _between(node)


def _type(node: ir.Node) -> Iterator[Finding]:
    kind = _integer_type(node)
    if kind is None or kind in _TYPES:
        if kind is ir.DataType.INT4:
            yield from _odd_int4(node)
        return
    remedy = "Export with FakeQuantOnnxExporter(for_runtime='tensorrt')"
    if kind is ir.DataType.INT32:
        remedy = "Keep biases float: quantize_bias=False, or the option for it of the tool"
    elif kind not in (ir.DataType.UINT8, ir.DataType.UINT4):
        remedy = "Train with Recipe(activation=ActivationSpec(bits=8))"
    missing = ""
    if node.op_type == "QuantizeLinear" and len(node.inputs) < 3:
        missing = ", the type of a QuantizeLinear without zero point"
    must = "TensorRT quantizes to INT8, INT4 and FP8 alone"
    yield Finding("error", name_of(node), must, f"{kind.name}{missing}", remedy)


def _integer_type(node: ir.Node) -> ir.DataType | None:
    """The type of the integers; what it is by ONNX where the zero point is left out."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero_point = array_of(node.inputs[2])
        if zero_point is not None:
            return ir.DataType.from_numpy(zero_point.dtype)
    if node.op_type == "QuantizeLinear":
        number = node.attributes.get_int("output_dtype", 0)
        return ir.DataType(number) if number else ir.DataType.UINT8
    integers = array_of(node.inputs[0])
    return None if integers is None else ir.DataType.from_numpy(integers.dtype)


def _odd_int4(node: ir.Node) -> Iterator[Finding]:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    last = None if shape is None or not len(shape) else shape[-1]
    if isinstance(last, int) and last % 2:
        yield Finding(
            "error",
            name_of(node),
            "the last size of an INT4 tensor must be even",
            f"{last}",
            "Store this weight as INT8: int4_weights=False",
        )


def _zero_point(node: ir.Node) -> Iterator[Finding]:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    zero_point = array_of(value)
    if zero_point is None:
        return
    numbers = zero_point.astype("float32")
    if numbers.any():
        first = numbers[numbers != 0].flat[0] if numbers.ndim else float(numbers)
        yield Finding("error", name_of(node), "the zero point must be 0", f"{first:g}", _SYMMETRIC)
    scale = array_of(node.inputs[1])
    if scale is not None and scale.size != zero_point.size:
        yield Finding(
            "error",
            name_of(node),
            "there must be as many zero points as scales",
            f"{zero_point.size} and {scale.size}",
            "Write one zero point per scale",
        )


def _scale(node: ir.Node) -> Iterator[Finding]:
    scale = array_of(node.inputs[1])
    if scale is None:
        if not is_constant(node.inputs[1]):
            must, got = "the scale must be a constant", "one that is computed"
            yield Finding("error", name_of(node), must, got, "Export static quantization")
        return
    if not scale.size or not (scale > 0).all():
        got = f"{scale.min():g}" if scale.size else "no scale"
        yield Finding("error", name_of(node), "all scales must be positive", got, "Calibrate it")
    if scale.size > 1:
        yield from _per_channel(node, scale.size)


def _per_channel(node: ir.Node, count: int) -> Iterator[Finding]:
    data = node.inputs[0]
    if not is_constant(data):
        yield Finding(
            "error",
            name_of(node),
            "activations must have one scale; only weights have one per channel",
            f"{count} scales",
            "Quantize the activation per tensor",
        )
        return
    shape = None if data is None else data.shape
    if shape is None:
        return
    axis = node.attributes.get_int("axis", 1)
    if -len(shape) <= axis < len(shape) and shape[axis] != count and node.inputs[1] is not None:
        ranks = len(node.inputs[1].shape or (0,))
        if ranks == 1:
            yield Finding(
                "error",
                name_of(node),
                "there must be a scale per output channel",
                f"{count} scales on axis {axis} of {list(shape)}",
                "Set the attribute axis to that of the output channels",
            )


def _between(node: ir.Node) -> Iterator[Finding]:
    """Nothing computes with the integers: INT8 tensors lie between Q and DQ alone."""
    if node.op_type != "QuantizeLinear":
        return
    for reader in readers(node.outputs[0]):
        if reader.op_type == "DequantizeLinear":
            continue
        remedy = "Write it before QuantizeLinear, or behind DequantizeLinear"
        if reader.op_type == "Clip":
            remedy = "Train with 8 bits, which need no Clip: ActivationSpec(bits=8)"
        yield Finding(
            "error",
            name_of(reader),
            "DequantizeLinear alone reads what QuantizeLinear gives",
            f"{reader.op_type} behind {name_of(node)!r}",
            remedy,
        )
