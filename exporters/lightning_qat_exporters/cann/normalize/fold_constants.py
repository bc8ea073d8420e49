"""What initializers alone determine, made initializers: scales, weights, statistics of batch norms.

A QAT model that was captured while its weights train finds their scales in the graph:
``max(|w|) / 127``. Exporters fold that for small weights and leave it for large ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.onnx_files.boundary.memory import MemoryBudget
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

    Each node is computed once, however many read it. No tensor of more elements than the largest
    initializer is made (of 2**20, where all are small).

    Args:
        qparams_only: Only scales and zero points.
        budget: What the computed tensors may take together.
    """

    def __init__(self, qparams_only: bool = False, budget: MemoryBudget | None = None) -> None:
        self.qparams_only, self.budget = qparams_only, budget

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place; what depends on an input stays as it is."""
        determined = _determined(model.graph)
        sizes = [v.const_value.size for v in model.graph.initializers.values() if v.const_value]
        limit = max([*sizes, _ALWAYS])
        wanted = [
            (node, index, value)
            for node in model.graph
            if node not in determined and (not self.qparams_only or _is_pair(node))
            for index, value in enumerate(node.inputs)
            if value is not None and (index or not self.qparams_only)
            if value.producer() in determined and _known(value) is None
        ]
        constants: dict[ir.Value, ir.Value] = {}
        folded = dict.fromkeys(value for _, _, value in wanted)
        for value, array in _computed(folded, determined, model.graph, limit, self.budget):
            constants[value] = initializer(model.graph, f"{value.name}.folded", array)
        for node, index, value in wanted:
            if value in constants:
                node.replace_input_with(index, constants[value])
        return ir.passes.PassResult(model, modified=bool(constants))


def _is_pair(node: ir.Node) -> bool:
    return node.op_type in _PAIR and not node.domain


def _known(value: ir.Value) -> ir.TensorProtocol | None:
    return ir.convenience.get_const_tensor(value)


def _determined(graph: ir.Graph) -> set[ir.Node]:
    """The nodes whose outputs constants alone determine."""
    found: set[ir.Node] = set()
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        if node.op_type in _FOLDED and not node.domain and given:
            if all(_known(v) is not None or v.producer() in found for v in given):
                found.add(node)
    return found


def _computed(
    wanted: Iterable[ir.Value],
    determined: set[ir.Node],
    graph: ir.Graph,
    limit: int,
    budget: MemoryBudget | None,
) -> Iterator[tuple[ir.Value, Array]]:
    """What constants alone determine, each node computed once; left out what is too large.

    An array is kept until the last node that reads it is computed. Of an illegal node nothing is
    made, nor of what reads it: whoever reads it says so.
    """
    wanted = set(wanted)
    needed = _makers(wanted)
    opsets = dict(graph.opset_imports)
    arrays: dict[ir.Value, Array | None] = {}
    readers = Counter(v for node in needed for v in node.inputs if v is not None)
    for node in [node for node in graph if node in needed]:
        inputs = [None if v is None else _array(v, arrays) for v in node.inputs]
        missing = any(a is None and v is not None for a, v in zip(inputs, node.inputs, strict=True))
        results = None if missing else _run(node, inputs, opsets, limit)
        for index, output in enumerate(node.outputs):
            array = None if results is None else np.asarray(results[index])
            if budget is not None and array is not None:
                budget.take(array.nbytes, f"what {node.op_type} makes of constants")
            if output in wanted and array is not None:
                yield output, array
            if readers[output]:
                arrays[output] = array
        for value in node.inputs:
            if value is not None:
                readers[value] -= 1
                if not readers[value]:
                    arrays.pop(value, None)


def _run(
    node: ir.Node, inputs: Sequence[Array | None], opsets: dict[str, int], limit: int
) -> list[Array] | None:
    """The outputs of a node; ``None`` where they are too large, or no legal ones."""
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
    return list(results) if len(results) == len(node.outputs) else None


def _array(value: ir.Value, arrays: Mapping[ir.Value, Array | None]) -> Array | None:
    tensor = _known(value)
    return arrays[value] if tensor is None else np.asarray(tensor.numpy())


def _makers(values: Iterable[ir.Value]) -> set[ir.Node]:
    """Every node that ``values`` are computed by."""
    makers: set[ir.Node] = set()
    waiting = list(values)
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
