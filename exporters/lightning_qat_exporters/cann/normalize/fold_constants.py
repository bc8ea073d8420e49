"""What initializers alone determine, made initializers: scales, weights, statistics of batch norms.

A QAT model that was captured while its weights train finds their scales in the graph:
``max(|w|) / 127``. Exporters fold that for small weights and leave it for large ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.onnx_files.graph_writer import initializer

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_BROADCASTING = frozenset(
    "Abs Neg Sign Sqrt Reciprocal Exp Log Round Floor Ceil Tanh Sigmoid Relu Clip Cast CastLike "
    "Not And Or Equal Greater GreaterOrEqual Less LessOrEqual Where Add Sub Mul Div Pow Max "
    "Min".split()
)
_SHRINKING = frozenset(
    "ReduceMax ReduceMin ReduceSum ReduceMean ReduceProd ReduceL1 ReduceL2 ReduceSumSquare Reshape "
    "Transpose Squeeze Unsqueeze Flatten Identity Shape Size Slice Split".split()
)
_FOLDED = _BROADCASTING | _SHRINKING | {"Concat", "Expand", "ConstantOfShape"}
_ALWAYS = 1 << 20
"""So many elements may be computed from constants however small these are."""


class FoldConstants(ir.passes.InPlacePass):
    """Make initializers of what constants alone determine; pairs of constants stay pairs.

    Memory is that of one tensor's computation at a time, and no tensor of more elements than the
    largest initializer is made (of 2**20, where all are small).

    Args:
        qparams_only: Only scales and zero points.
    """

    def __init__(self, qparams_only: bool = False) -> None:
        self.qparams_only = qparams_only

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place; what depends on an input stays as it is."""
        order = _determined(model.graph)
        sizes = [v.const_value.size for v in model.graph.initializers.values() if v.const_value]
        limit = max([*sizes, _ALWAYS])
        folded: dict[ir.Value, ir.Value | None] = {}
        for node in tuple(model.graph):
            if node in order or (self.qparams_only and not _is_pair(node)):
                continue
            for index, value in enumerate(node.inputs):
                maker = None if value is None else value.producer()
                if value is None or maker not in order or _known(value) is not None:
                    continue
                if self.qparams_only and index == 0:
                    continue
                if value not in folded:
                    array = _computed(value, order, dict(model.graph.opset_imports), limit)
                    name = f"{value.name}.folded"
                    folded[value] = None if array is None else initializer(model.graph, name, array)
                if (constant := folded[value]) is not None:
                    node.replace_input_with(index, constant)
        return ir.passes.PassResult(model, modified=any(folded.values()))


def _is_pair(node: ir.Node) -> bool:
    return node.op_type in _PAIR and not node.domain


def _known(value: ir.Value) -> ir.TensorProtocol | None:
    return ir.convenience.get_const_tensor(value)


def _determined(graph: ir.Graph) -> dict[ir.Node, int]:
    """The nodes whose outputs constants alone determine, with their places in the graph."""
    found: dict[ir.Node, int] = {}
    for place, node in enumerate(graph):
        given = [value for value in node.inputs if value is not None]
        if node.op_type in _FOLDED and not node.domain and given:
            if all(_known(v) is not None or v.producer() in found for v in given):
                found[node] = place
    return found


def _computed(
    value: ir.Value, order: Mapping[ir.Node, int], opsets: dict[str, int], limit: int
) -> Array | None:
    """The value of what constants alone determine; ``None`` where it is too large, or no legal one.

    Whoever reads an illegal node says so.
    """
    arrays: dict[ir.Value, Array] = {}
    for node in sorted(_makers(value), key=order.__getitem__):
        inputs = [None if v is None else _array(v, arrays) for v in node.inputs]
        try:
            if _size(node, inputs) > limit:
                return None
            names = [None if v is None else f"i{i}" for i, v in enumerate(node.inputs)]
            proto = ir.to_proto(node)
            proto.input[:] = [name or "" for name in names]
            feeds = {n: a for n, a in zip(names, inputs, strict=True) if n is not None}
            results: Any = ReferenceEvaluator(proto, opsets=opsets).run(None, feeds)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            return None
        arrays |= {o: np.asarray(r) for o, r in zip(node.outputs, results, strict=True)}
    return arrays[value]


def _array(value: ir.Value, arrays: Mapping[ir.Value, Array]) -> Array:
    tensor = _known(value)
    return arrays[value] if tensor is None else np.asarray(tensor.numpy())


def _makers(value: ir.Value) -> set[ir.Node]:
    """Every node that ``value`` is computed by."""
    makers: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is not None and _known(value) is None and node not in makers:
            makers.add(node)
            waiting += [v for v in node.inputs if v is not None]
    return makers


def _size(node: ir.Node, inputs: Iterable[Array | None]) -> int:
    """The number of elements that a node makes."""
    given = [array for array in inputs if array is not None]
    if node.op_type in _BROADCASTING:
        return math.prod(np.broadcast_shapes(*(array.shape for array in given)))
    if node.op_type == "ConstantOfShape":
        return math.prod(given[0].tolist())
    if node.op_type == "Expand":
        return math.prod(np.broadcast_shapes(given[0].shape, tuple(given[1].tolist())))
    sizes = [array.size for array in given]
    return sum(sizes) if node.op_type == "Concat" else max(sizes)
