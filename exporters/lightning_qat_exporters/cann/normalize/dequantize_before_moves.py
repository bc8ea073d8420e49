"""Dequantize before operators that move integers, so that every pair stands together again.

Tools that write integers between QuantizeLinear and DequantizeLinear (a Transpose, a Concat of one
grid, a Cast to the type that they have) compute the same as if real values were moved.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import CannotExpress
from lightning_qat.ir.operators import value_preserving
from lightning_qat_exporters.cann.qdq_graph.constants import constant, is_constant
from lightning_qat_exporters.cann.qdq_graph.names import label
from lightning_qat_exporters.cann.qdq_graph.qparams import NodeQParams, qparams_of, undoes
from lightning_qat_exporters.onnx_files.graph_writer import initializer

# Relu and Trilu put an integer 0 where the real zero has another integer; TopK gives indices too.
_FIRST = frozenset(value_preserving("onnx")) - {"Relu", "Trilu", "TopK", "Dropout"}
"""Operators that output values of their first input, whatever the zero point."""


class DequantizeBeforeMoves(ir.passes.InPlacePass):
    """Move a DequantizeLinear in front of what stands between it and its QuantizeLinear.

    All integers that meet in an operator must have one scale and zero point. Integers that are a
    graph output are quantized again behind the operator, which changes nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        moved = _Moved(model.graph)
        for node in tuple(model.graph):
            if node.op_type == "DequantizeLinear" and not node.domain:
                moved.take(node)
        for output in tuple(model.graph.outputs):
            moved.take_output(output)
        for node in model.graph:
            # Sizes are those of the real tensor; nothing else may read the integers.
            maker = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
            if node.op_type in ("Shape", "Size") and maker and maker.op_type == "QuantizeLinear":
                node.replace_input_with(0, maker.inputs[0])
                moved.any = True
        return ir.passes.PassResult(model, modified=moved.any)


class _Moved:
    """The real tensors that stand for moved integers, each written once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.any = False
        self._real: dict[ir.Value, ir.Value] = {}
        self._quantize_of = _quantize_of(graph)
        self._outputs = {value: place for place, value in enumerate(graph.outputs)}
        self._requantized: set[ir.Value] = set()

    def take(self, dequantize: ir.Node) -> None:
        """Let the readers of a DequantizeLinear read the same values, moved in real form."""
        value = dequantize.inputs[0]
        if value is None or not _is_move(value.producer()) or is_constant(value):
            return
        try:
            qparams = qparams_of(dequantize)
        except CannotExpress:
            return
        quantize = self._quantize_of.get(value)
        if qparams.scale.size != 1 or quantize is None:
            return
        if not undoes(dequantize, qparams_of(quantize)):
            return
        real = self._real_of(value, dequantize, qparams)
        old = dequantize.outputs[0]
        if old.is_graph_output():
            # The output keeps its name; what made it before is removed as unread.
            real = self._written(real, "Identity", [real], f"{label(dequantize)}.moved")
            real.name, old.name = old.name, f"{old.name}.before"
            self._replace_output(old, real)
        ir.convenience.replace_all_uses_with(old, real)
        self.any = True
        self._requantize_outputs(value, dequantize, qparams)

    def take_output(self, value: ir.Value) -> None:
        """The same for moved integers that nothing dequantizes: they are only a graph output."""
        first = self._quantize_of.get(value)
        if first is None or not _is_move(value.producer()):
            return
        try:
            real = ir.TensorType(ir.DataType.from_numpy(qparams_of(first).scale.dtype))
        except CannotExpress:
            return
        like = ir.node(
            "DequantizeLinear",
            [value, *first.inputs[1:]],
            domain=first.domain,
            outputs=[ir.Value(name=f"{value.name}.dequantized", type=real)],
            name=f"{label(first)}.dequantize",
        )
        self.graph.append(like)  # It says which numbers; what it writes is read by nothing.
        self.take(like)

    def _replace_output(self, old: ir.Value, new: ir.Value) -> None:
        place = self._outputs.pop(old)
        self._outputs[new] = place
        self.graph.outputs[place] = new

    def _real_of(self, value: ir.Value, like: ir.Node, qparams: NodeQParams) -> ir.Value:
        # All that dequantizes it has one scale and zero point, those of the QuantizeLinear. What
        # it is moved from comes first: chains of moves are as long as a file has them.
        waiting = [value]
        while waiting:
            moved = waiting[-1]
            node = moved.producer()
            assert node is not None  # _quantize_of walked through it
            before = _data(node) if _is_move(node) else []
            missing = [v for v in before if v not in self._real]
            if moved in self._real or not missing:
                waiting.pop()
            if moved not in self._real:
                waiting += missing
                if not missing:
                    self._write_real(moved, node, like, qparams)
        return self._real[value]

    def _write_real(
        self, value: ir.Value, node: ir.Node, like: ir.Node, qparams: NodeQParams
    ) -> None:
        """Write the real values of integers, those that they are moved from being there."""
        if not _is_move(node):
            self._real[value] = self._dequantized(value, node, like)
        elif node.op_type == "Cast":
            self._real[value] = self._real[_data(node)[0]]
        else:
            self._real.update(zip(node.outputs, self._move(node, like, qparams), strict=True))

    def _dequantized(self, value: ir.Value, maker: ir.Node, like: ir.Node) -> ir.Value:
        attributes = [a for a in like.attributes.values() if a.name != "axis"]
        real = ir.Value(name=f"{value.name}.real", type=like.outputs[0].type, shape=value.shape)
        node = ir.Node(
            like.domain,
            "DequantizeLinear",
            [value, *like.inputs[1:]],
            attributes,
            outputs=[real],
            name=f"{value.name}.dequantize",
        )
        self.graph.insert_after(maker, node)
        return real

    def _move(self, node: ir.Node, like: ir.Node, qparams: NodeQParams) -> list[ir.Value]:
        """The outputs of the same operator on real values."""
        reals = {v: self._real[v] for v in _data(node)}
        inputs = [reals.get(v, v) if v is not None else None for v in node.inputs]
        if node.op_type == "Pad":
            inputs = self._real_fill(node, inputs, qparams)
        type_ = like.outputs[0].type
        outputs = [ir.Value(name=f"{v.name}.real", type=type_, shape=v.shape) for v in node.outputs]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            outputs=outputs,
            name=node.name,
        )
        node.name = f"{label(node)}.integers"
        self.graph.insert_after(node, copy)
        return outputs

    def _real_fill(
        self, node: ir.Node, inputs: list[ir.Value | None], qparams: NodeQParams
    ) -> list[ir.Value | None]:
        """The inputs of a Pad whose fill is an integer: 0 where it is left out."""
        stored = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        integer = 0 if stored is None else int(stored.reshape(()))
        fill = (integer - qparams.zero_point[0]) * qparams.scale[0]
        array = np.asarray(fill, qparams.scale.dtype)
        inputs = [*inputs, None][:4] if len(inputs) < 3 else inputs
        inputs[2] = initializer(self.graph, f"{label(node)}.fill", array)
        return inputs

    def _requantize_outputs(self, value: ir.Value, like: ir.Node, qparams: NodeQParams) -> None:
        """Quantize moved integers that are a graph output from their real values."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            node = value.producer()
            if value in self._requantized or node is None or not _is_move(node):
                continue
            self._requantized.add(value)
            if value.is_graph_output():
                real = self._real_of(value, like, qparams)
                inputs = [real, *like.inputs[1:]]
                name = f"{label(node)}.requantized"
                integers = self._written(real, "QuantizeLinear", inputs, name, value.type)
                integers.name, value.name = value.name, f"{value.name}.before"
                self._replace_output(value, integers)
            waiting += _data(node)

    def _written(
        self,
        after: ir.Value,
        op_type: str,
        inputs: list[ir.Value | None],
        name: str,
        type_: ir.TypeProtocol | None = None,
    ) -> ir.Value:
        maker = after.producer()
        assert maker is not None  # a DequantizeLinear or a move made it
        output = ir.Value(name=f"{name}.output", type=type_ or after.type, shape=after.shape)
        self.graph.insert_after(maker, ir.node(op_type, inputs, outputs=[output], name=name))
        return output


def _quantize_of(graph: ir.Graph) -> dict[ir.Value, ir.Node]:
    """The QuantizeLinear whose integers a value has, its own, clipped or moved.

    Of several that meet in one operator, all with the same parameters, it is the first one.
    """
    found: dict[ir.Value, ir.Node] = {}
    for node in graph:
        if node.op_type == "QuantizeLinear":
            if not is_constant(node.inputs[0]):
                found[node.outputs[0]] = node
            continue
        clips = node.op_type == "Clip" and not node.domain
        if not clips and not _is_move(node):
            continue
        data = _data(node)[:1] if clips else _data(node)
        origins = [found.get(value) for value in data]
        first = origins[0] if origins else None
        if first is None or (clips and node.inputs[0] is not first.outputs[0]):
            continue
        try:
            qparams = qparams_of(first)
            others = {id(o): o for o in origins if o is not first}.values()
            same = all(o is not None and undoes(o, qparams) for o in others)
        except CannotExpress:
            continue
        if same and (node.op_type != "Cast" or _keeps_type(node, qparams)):
            found.update(dict.fromkeys(node.outputs, first))
    return found


def _is_move(node: ir.Node | None) -> bool:
    if node is None or node.domain:
        return False
    if node.op_type == "Pad":
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        in_constant_mode = node.attributes.get_string("mode", "constant") == "constant"
        return not in_constant_mode or fill is None or constant(fill) is not None
    return node.op_type in _FIRST or node.op_type in ("Cast", "Concat")


def _data(node: ir.Node) -> list[ir.Value]:
    """The inputs that a move takes values of."""
    inputs = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return [value for value in inputs if value is not None]


def _keeps_type(cast: ir.Node, qparams: NodeQParams) -> bool:
    to = cast.attributes.get_int("to", 0)
    return ir.DataType(to) == ir.DataType.from_numpy(qparams.dtype)
