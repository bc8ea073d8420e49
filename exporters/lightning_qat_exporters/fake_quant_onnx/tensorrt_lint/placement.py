"""Rules for where pairs stand: at weighted operators, residual additions and concatenations."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from lightning_qat.export.lint import Finding
from lightning_qat_exporters.fake_quant_onnx.tensorrt_lint.graph import (
    CONVOLUTIONS,
    WEIGHTED,
    behind_pair,
    is_constant,
    name_of,
    reads_pair,
    weighted_source,
)
from lightning_qat_exporters.onnx_files.graph_writer import array_of


def placement_findings(graph: ir.Graph) -> Iterator[Finding]:
    """What stands in the way of integer kernels, or of their fusion."""
    for node in graph:
        if node.op_type in WEIGHTED:
            yield from _weighted(node)
        elif node.op_type == "Add":
            yield from _addition(node)
        elif node.op_type == "Concat":
            yield from _concatenation(node)


def _weighted(node: ir.Node) -> Iterator[Finding]:
    data, weight = (reads_pair(value) for value in node.inputs[:2])
    if data != weight:
        missing = "weight" if data else "data"
        producer = None if node.inputs[1] is None else node.inputs[1].producer()
        got = f"no pair on the {missing}"
        if data and producer is not None and is_constant(node.inputs[1]):
            got = f"{producer.op_type} between DequantizeLinear and the weight"
        yield Finding(
            "warning",
            name_of(node),
            "data and weight must both come from DequantizeLinear, else the operator is computed "
            "in float",
            got,
            f"Quantize the {missing}, or leave the whole layer float",
        )
        return
    if not data:
        return
    if node.op_type in CONVOLUTIONS and not is_constant(node.inputs[1]):
        yield Finding(
            "warning",
            name_of(node),
            "the weight of a convolution must be a constant",
            "one that is computed",
            "Convert the model, so that the weight becomes an initializer",
        )
    yield from _weight_axis(node)


def _weight_axis(node: ir.Node) -> Iterator[Finding]:
    weight = node.inputs[1]
    dequantize = None if weight is None else weight.producer()
    scale = None if dequantize is None else array_of(dequantize.inputs[1])
    if weight is None or dequantize is None or scale is None or scale.ndim != 1 or scale.size == 1:
        return
    shape = weight.shape or getattr(dequantize.inputs[0], "shape", None)
    rank = 0 if shape is None else len(shape)
    if not rank:
        return
    expected = {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}.get(node.op_type)
    if expected is None:
        expected = 0 if node.attributes.get_int("transB", 0) else 1
    axis = dequantize.attributes.get_int("axis", 1) % rank
    if axis != expected:
        yield Finding(
            "error",
            name_of(node),
            f"the scales of its weight must be those of the output channels, axis {expected}",
            f"axis {axis}",
            "Quantize the weight per output channel, or per tensor",
        )


def _addition(node: ir.Node) -> Iterator[Finding]:
    if any(is_constant(value) for value in node.inputs):
        return
    sources = [weighted_source(behind_pair(value)) for value in node.inputs]
    if not any(sources):
        return
    pairs = [reads_pair(value) for value in node.inputs]
    if not any(pairs):
        yield Finding(
            "warning",
            name_of(node),
            "one branch of a residual addition must be quantized, else the convolution fused with "
            "it gives float",
            "two float branches",
            "Quantize the branch that is no convolution's, or both: Recipe(joins=True)",
        )
        return
    for source, pair, other in zip(sources, pairs, reversed(pairs), strict=True):
        if source is not None and source.op_type in CONVOLUTIONS and pair and other:
            yield Finding(
                "advice",
                name_of(node),
                "a pair between a convolution and a residual addition keeps TensorRT from fusing "
                "the two into one kernel",
                f"a pair behind {name_of(source)!r}",
                "Nothing is computed wrongly. Train with Recipe(joins='fused_sums'), which leaves "
                "that branch float, or take the pair out of the file: the branch is then added "
                "unrounded",
            )
            return


def _concatenation(node: ir.Node) -> Iterator[Finding]:
    branches = [value for value in node.inputs if not is_constant(value)]
    pairs = [value for value in branches if reads_pair(value)]
    if not pairs:
        return
    if len(pairs) < len(branches):
        yield Finding(
            "warning",
            name_of(node),
            "all branches of a concatenation must be quantized, or none",
            f"{len(pairs)} of {len(branches)} with a pair",
            "Quantize all of them: Recipe(joins=True)",
        )
        return
    scales = {_scale(value) for value in pairs} - {None}
    if len(scales) > 1:
        yield Finding(
            "advice",
            name_of(node),
            "branches of a concatenation should share one scale, else each is requantized",
            f"{len(scales)} scales",
            "Let them share a quantizer: Recipe(joins=True)",
        )


def _scale(value: ir.Value | None) -> float | None:
    producer = None if value is None else value.producer()
    scale = None if producer is None else array_of(producer.inputs[1])
    return float(scale.reshape(-1)[0]) if scale is not None and scale.size == 1 else None
