"""Make every requantization explicit, so that litert-torch's converter cannot choose scales.

The converter has operators whose output must have the qparams (scale and zero point) of their input
(pools, reshapes, selections) and moves qparams through them, also against the graph's direction.
Where two meet it keeps one of them, and values saturate: a softplus, which is decomposed to a
selection, was 38 steps off, a bilinear resize 13. These rules are applied first:

1. A tensor that is read with two qparams, or with qparams and in float, is written in float.
2. An operator that preserves values, or averages them, between two qparams is computed with those
   of its input and requantized.
3. An operator with a fixed output range (sigmoid, softmax, tanh) is requantized from that range.
4. A layer that is read in float is kept apart, else the converter multiplies constants that come
   later into its weight.
5. An operator that is not listed here, or reads a float tensor, is computed in float; else a float
   reader of its output may get values that were never rounded. A 3-D convolution is: LiteRT has
   it in float only.
6. An operator whose scales LiteRT's integer kernel cannot compute with (``kernel_limits``) is
   computed in float.

To keep apart means to put a mark between two operators: one that the converter has in float only.
``remove_marks`` removes the marks from the finished file.
"""

from __future__ import annotations

import operator
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lightning_qat.ir.operators import fixed_scale_and_zero_point, value_preserving
from lightning_qat.ir.ops import as_dequantize, make_fake_quantize
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat_exporters.tflite.decompose.constant_nodes import fixed_nodes
from lightning_qat_exporters.tflite.flatbuffer.file import kind_of
from lightning_qat_exporters.tflite.flatbuffer.kernel_limits import broken_limit, constant_scale
from lightning_qat_exporters.tflite.litert import (
    conv_transpose_op as conv_transpose_op,  # its operator
)

_ATEN = torch.ops.aten

MARKS = {_ATEN.ceil: "CEIL", _ATEN.sin: "SIN", _ATEN.cos: "COS"}
"""Operators that can be a mark, in torch and in a file; the first that a model does not use is."""


class PlainQParams(NamedTuple):
    """Per-tensor ``QParams`` as Python numbers, which can be compared and hashed."""

    scale: float
    zero_point: int
    grid: IntegerGrid

    @classmethod
    def of(cls, qparams: QParams) -> PlainQParams:
        """The numbers of per-tensor qparams."""
        return cls(float(qparams.scale), int(qparams.zero_point), qparams.grid)

    def as_qparams(self) -> QParams:
        """The same numbers as tensors."""
        zero_point = torch.tensor(self.zero_point, dtype=torch.int32)
        return QParams(torch.tensor(self.scale), zero_point, self.grid)


_LAYERS = (
    *(_ATEN.conv1d, _ATEN.conv2d, _ATEN.conv3d, _ATEN.linear),
    torch.ops.lightning_qat_litert.transpose_conv,
)

_COMPUTES = (
    *(_ATEN.add, _ATEN.sub, _ATEN.mul, _ATEN.mean, _ATEN.matmul, _ATEN.bmm),
    *(_ATEN.hardswish, _ATEN.gelu, _ATEN.leaky_relu, _ATEN.scaled_dot_product_attention),
    # Float, and decomposed to nothing that moves qparams.
    *(_ATEN.layer_norm, _ATEN.group_norm, _ATEN.silu),
)
"""Operators whose inputs and output may have qparams of their own."""

_FIXED = {
    getattr(_ATEN, name): PlainQParams(*fixed_scale_and_zero_point(name), IntegerGrid.signed(8))
    for name in ("sigmoid", "softmax", "tanh")
}
"""Operators whose output qparams LiteRT's specification fixes, at 8 bits.

hardsigmoid, whose range is fixed too, is rewritten to ADD and MUL before.
"""

_LIMITED = {_ATEN.add: "ADD", _ATEN.softmax: "SOFTMAX"}
"""Operators whose integer kernels have limits, with LiteRT's names."""

_COMPUTED_IN_FLOAT = (
    # litert-torch decomposes these, or has them in float: only those that were tried are listed
    # as value-preserving, so that the converter moves no qparams through the others.
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool3d"),
    *("upsample_nearest1d", "upsample_nearest3d", "index_select", "channel_shuffle"),
    *("movedim", "moveaxis", "swapaxes", "swapdims", "narrow", "tensor_split"),
    *("broadcast_to", "expand_as", "feature_dropout", "detach", "reshape_as", "view_as", "ravel"),
    *("repeat_interleave", "amax", "amin", "topk", "sort", "gather", "take_along_dim"),
    *("tril", "triu"),
    # Replaced before: by concatenations, and by their input.
    *("tile", "clone"),
)

_VALUE_PRESERVING = (
    *(getattr(_ATEN, n) for n in value_preserving("aten") if n not in _COMPUTED_IN_FLOAT),
    # Their inputs have one scale, or are requantized; a table of an embedding is a weight.
    *(_ATEN.cat, _ATEN.stack, _ATEN.embedding),
)
"""Operators that output values of their input, with its qparams."""

_AVERAGES = (
    *(_ATEN.avg_pool1d, _ATEN.avg_pool2d, _ATEN.adaptive_avg_pool2d),
    _ATEN.upsample_bilinear2d,
)
"""Operators that LiteRT computes with one scale although their results need rounding."""


class Annotated:
    """A functional graph with the qparams of its fake quantizations.

    Args:
        graph: Without operators that write in place.
        qparams: Every fake quantization with its qparams; those that are added are entered.

    Attributes:
        mark: The operator that stands between others as a mark.
    """

    def __init__(self, graph: fx.Graph, qparams: dict[fx.Node, PlainQParams]) -> None:
        self.graph, self.qparams = graph, qparams
        taken = {kind(node) for node in graph.nodes}
        self.mark = next(mark for mark in MARKS if mark not in taken)
        # The converter computes these, a mark among them as what it is, before it can be removed.
        self._fixed = fixed_nodes(graph, set())

    def make_explicit(self) -> None:
        """Apply the rules, in place."""
        # Backwards, so that what reads a tensor is settled before the tensor is.
        for node in reversed(list(self.graph.nodes)):
            if node in self.qparams or is_constant(node) or not is_real(node) or not node.users:
                continue
            if node.op == "call_function":
                self._settle(node)
            if len(self.reached(node)) > 1:
                self.part(node, list(node.users))
        self.graph.lint()

    def _settle(self, node: fx.Node) -> None:
        """Rules 2 to 5 for one operator."""
        source, output = self.source(node), self.output(node)
        if _is_layer_3d(node) or self._breaks_a_limit(node, output):
            self.compute_in_float(node)
        elif kind(node) in _LAYERS:
            end = node
            while len(end.users) == 1 and activates(following := next(iter(end.users))):
                end = following
            if None in self.reached(end):
                self.part(end, list(end.users))
        elif preserves_values(node):
            if source is not None and output is not None and source != output:
                self.requantize(node, source)
            elif len(self.read(node)) > 1:
                self.compute_in_float(node)
        elif kind(node) in _FIXED and source is not None and output is not None:
            fixed = _FIXED[kind(node)]
            if output.grid.dtype is not torch.int8:
                self.compute_in_float(node)
            elif output != fixed:
                self.requantize(node, fixed)
        elif kind(node) in _AVERAGES and not is_mean(node) and source and output:
            self.requantize(node, source)
        elif None in self.read(node) or (
            kind(node) not in (*_COMPUTES, *_FIXED) and not is_mean(node)
        ):
            self.compute_in_float(node)

    def _breaks_a_limit(self, node: fx.Node, output: PlainQParams | None) -> bool:
        """Rule 6: whether LiteRT's kernel would abort."""
        if kind(node) not in _LIMITED or output is None:
            return False
        scales = []
        for x in node.all_input_nodes:
            if (qparams := self._qparams_of(x)) is not None:
                scales.append(qparams.scale)
            elif x.op == "get_attr":
                scales.append(self._scale_of(x))
            else:
                return False
        if kind(node) is _ATEN.softmax and output.grid.dtype is torch.int8:
            output = _FIXED[_ATEN.softmax]
        bits = torch.iinfo(output.grid.dtype).bits
        return broken_limit(_LIMITED[kind(node)], scales, output.scale, bits) is not None

    def _scale_of(self, constant: fx.Node) -> float:
        value: Tensor = attrgetter(constant.target)(self.graph.owning_module)  # type: ignore[arg-type]
        return constant_scale(float(value.abs().max()))

    def read(self, node: fx.Node) -> set[PlainQParams | None]:
        """The qparams of an operator's real inputs; None: float."""
        inputs = [x for x in node.all_input_nodes if is_real(x) and not is_constant(x)]
        return {self._qparams_of(x) for x in inputs}

    def _qparams_of(self, x: fx.Node) -> PlainQParams | None:
        """The qparams of a tensor, which operators that preserve values keep; ``None``: float."""
        while x not in self.qparams and preserves_values(x) and isinstance(x.args[0], fx.Node):
            x = x.args[0]
        return self.qparams.get(x)

    def source(self, node: fx.Node) -> PlainQParams | None:
        """The qparams of an operator's real inputs; ``None``: float, or several."""
        found = self.read(node)
        return found.pop() if len(found) == 1 else None

    def output(self, node: fx.Node) -> PlainQParams | None:
        """The qparams that an operator's output is read with; ``None``: float, or several."""
        found = self.reached(node)
        return found.pop() if len(found) == 1 else None

    def reached(self, node: fx.Node) -> set[PlainQParams | None]:
        """The qparams that readers behind value-preserving operators use; None: float."""
        found: set[PlainQParams | None] = set()
        for user in node.users:
            if user in self.qparams:
                found.add(self.qparams[user])
            elif preserves_values(user):
                found |= self.reached(user)
            elif is_real(user) or user.op == "output":
                found.add(None)
        return found

    def quantize(self, x: fx.Node, qparams: PlainQParams) -> fx.Node:
        """Add a fake quantization at the graph's insertion point."""
        name = f"{x.name}.output"
        new = make_fake_quantize(self.graph, x, qparams.as_qparams(), name)
        self.qparams[new] = qparams
        return new

    def requantize(self, node: fx.Node, qparams: PlainQParams) -> None:
        """Quantize an operator's output with some qparams before it is quantized with others."""
        users = list(node.users)
        # Several nodes are added; after `node` itself, their order would be reversed.
        with self.graph.inserting_before(node.next):
            new = self.quantize(node, qparams)
        for user in users:
            user.replace_input_with(node, new)
        self.part(new, users)

    def compute_in_float(self, node: fx.Node) -> None:
        """Keep an operator apart from the quantizations before and after it."""
        for source in node.all_input_nodes:
            if self._qparams_of(source) is not None:
                self.part(source, [node])
        if self.reached(node) - {None}:
            self.part(node, list(node.users))

    def part(self, node: fx.Node, users: list[fx.Node]) -> None:
        """Put a mark between a tensor and some of the operators that read it."""
        if not isinstance(node.meta["val"], Tensor) or node in self._fixed:
            return
        with self.graph.inserting_after(node):
            mark = self.graph.call_function(self.mark.default, (node,))
        mark.meta["val"] = node.meta["val"]
        for user in users:
            if is_real(user) or user.op == "output":
                user.replace_input_with(node, mark)


def remove_marks(file: Any, mark: str) -> None:
    """Take the marks out of a file, in place, and join what stood around them.

    DEQUANTIZE and QUANTIZE that meet become one QUANTIZE from integers to integers.

    Args:
        file: As ``unpack`` gives it.
        mark: The file's name of the operator that was the mark.
    """
    graph = file.subgraphs[0]
    for operator_ in [op for op in graph.operators if kind_of(file, op) == mark]:
        _replace_tensor(file, int(operator_.outputs[0]), int(operator_.inputs[0]))
        graph.operators.remove(operator_)
    made_by = {
        int(op.outputs[0]): op for op in graph.operators if kind_of(file, op) == "DEQUANTIZE"
    }
    for operator_ in graph.operators:
        if kind_of(file, operator_) == "QUANTIZE" and int(operator_.inputs[0]) in made_by:
            operator_.inputs = [int(made_by[int(operator_.inputs[0])].inputs[0])]
    read = {int(i) for op in graph.operators for i in op.inputs} | set(map(int, graph.outputs))
    for output, dequantize in made_by.items():
        if output not in read:
            graph.operators.remove(dequantize)


def _replace_tensor(file: Any, old: int, new: int) -> None:
    graph = file.subgraphs[0]
    for holder in graph.operators:
        holder.inputs = [new if int(index) == old else int(index) for index in holder.inputs]
    graph.outputs = [new if int(index) == old else int(index) for index in graph.outputs]
    for entry in file.signatureDefs[0].outputs:
        if int(entry.tensorIndex) == old:
            entry.tensorIndex = new


def kind(node: fx.Node) -> Any:
    """An operator without its overload."""
    return getattr(node.target, "overloadpacket", node.target)


def is_real(node: fx.Node) -> bool:
    """Whether a node is a tensor of real numbers, or several."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        value = value[0] if value else None
    return isinstance(value, Tensor) and value.is_floating_point()


def is_constant(node: fx.Node) -> bool:
    """Whether a node is a weight or another constant."""
    return node.op == "get_attr" or as_dequantize(node) is not None


def is_mean(node: fx.Node) -> bool:
    """Whether a node is pooling to size 1, which LiteRT computes as MEAN."""
    return kind(node) is _ATEN.adaptive_avg_pool2d and set(node.args[1]) == {1}  # type: ignore[arg-type]


def preserves_values(node: fx.Node) -> bool:
    """Whether a node outputs values of its input, with its qparams."""
    arguments: Any = node.args
    if kind(node) in (_ATEN.constant_pad_nd, _ATEN.pad):
        # Another value than zero may lie between two steps.
        return set(arguments[2:]) <= {"constant", None, 0}
    if kind(node) in (_ATEN.hardtanh, _ATEN.relu6):
        return kind(node) is _ATEN.relu6 or tuple(arguments[1:3]) == (0.0, 6.0)
    if node.target is operator.getitem:
        return preserves_values(arguments[0])
    return kind(node) in _VALUE_PRESERVING


def _is_layer_3d(node: fx.Node) -> bool:
    """Whether a node is a convolution over three dimensions, transposed or not."""
    return kind(node) in _LAYERS and node.all_input_nodes[0].meta["val"].dim() == 5


def activates(node: fx.Node) -> bool:
    """Whether LiteRT fuses a node to the layer before it."""
    return kind(node) in (_ATEN.relu, _ATEN.relu6, _ATEN.hardtanh)
