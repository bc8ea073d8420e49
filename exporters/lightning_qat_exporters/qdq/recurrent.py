"""A converted model's LSTM and GRU layers as one node each, for targets that have such nodes.

``convert`` unrolls a recurrent layer into a matrix product per step. Here the steps become one
operator again, with the gates in ONNX's order: LSTM i, o, f, c and GRU z, r, h.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lightning_qat.export.protocol import Unsupported
from lightning_qat.ir.exported_program import Constants, clean_up, copied
from lightning_qat.ir.ops import (
    DEQUANTIZE,
    FAKE_QUANTIZE,
    DequantizeCall,
    FakeQuantizeCall,
    as_dequantize,
    as_fake_quantize,
)
from lightning_qat.ir.quantized_model import QuantizedModel, QuantizedTensor
from lightning_qat.ir.recurrence import GATES, Recurrence

_LIBRARY: Any = torch.library.Library(  # type: ignore[no-untyped-call]
    "lightning_qat_exporters", "DEF"
)
# Translated, never run: time, direction, batch, features, as ONNX's operators of these names.
_LIBRARY.define("lstm(Tensor x, Tensor w, Tensor r, Tensor? b, Tensor h, Tensor c) -> Tensor[]")
_LIBRARY.define("gru(Tensor x, Tensor w, Tensor r, Tensor? b, Tensor h) -> Tensor[]")

_aten: Any = torch.ops.aten


def _lstm(x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, h: Tensor, c: Tensor) -> list[Tensor]:
    return [*_sizes(x, h), torch.empty_like(c)]


def _gru(x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, h: Tensor) -> list[Tensor]:
    return _sizes(x, h)


def _sizes(x: Tensor, h: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape[0], 1, x.shape[1], h.shape[2]), torch.empty_like(h)]


_as_fake: Any = torch.library.register_fake
_as_fake("lightning_qat_exporters::lstm", _lstm)
_as_fake("lightning_qat_exporters::gru", _gru)


class _Steps:
    """The unrolled steps of a recurrent layer in a program.

    Args:
        layer: The layer.
        program: The program; its nodes are looked up once.
    """

    def __init__(self, layer: Recurrence, program: ExportedProgram) -> None:
        self.layer, self.nodes = layer, layer.nodes(program)

    def products(self, weight: str) -> list[fx.Node]:
        """The matrix products with one of the layer's weights."""
        wanted = self.layer.key(weight)
        return [n for n in self.nodes if _weight_key(n) == wanted]

    def initial_cell(self) -> fx.Node:
        """The one initial cell state of an LSTM with one direction and one call."""
        (name,) = self.layer.initial_cells
        found: fx.Node = next(n for n in self.nodes[0].graph.nodes if n.name == name)
        return found


def with_recurrent_nodes(model: QuantizedModel) -> tuple[QuantizedModel, tuple[Unsupported, ...]]:
    """Replace the steps of every recurrent layer by one node, where there is a node for it.

    A layer needs one direction, no further layers or projection, one call, and grids of 8 bits. Its
    input, initial hidden state and weights stay explicitly quantized; the hidden states between the
    steps are the node's own matter.

    Args:
        model: The converted model; left as it is.

    Returns:
        The same model with nodes ``lightning_qat_exporters::lstm`` and ``gru``, and the layers that
        stayed unrolled, with the reason.
    """
    program = copied(model.program)
    unrolled, left = [], []
    # All are looked up before any is fused: that removes nodes.
    for steps in [_Steps(layer, program) for layer in model.recurrences]:
        layer, reason = steps.layer, _why_not(steps, model.tensors)
        if reason is None:
            _fuse(program, steps, model.tensors)
        else:
            remedy = "It is computed step by step on integers"
            reason = f"{layer.kind} has no device node: {reason}"
            unrolled.append(layer)
            left.append(Unsupported(layer.name, reason, remedy))
    clean_up(program)
    fused = dataclasses.replace(model, program=program, recurrences=tuple(unrolled))
    return fused, tuple(left)


def _why_not(steps: _Steps, tensors: Mapping[str, QuantizedTensor]) -> str | None:
    """The reason why a layer has no device node; ``None`` when it has one."""
    prefix = steps.layer.key("")
    own = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
    weights = {key for key in own if key.startswith("weight")}
    if weights != {"weight_ih_l0", "weight_hh_l0"}:
        return "it must have one layer, one direction and no projection"
    if len(steps.products("weight_ih_l0")) > 1:
        return "it is called more than once"
    reads = [product.args[0] for name in weights for product in steps.products(name)]
    grids = [as_fake_quantize(node) if isinstance(node, fx.Node) else None for node in reads]
    if any(grid is None for grid in grids):
        return "its input and hidden state must be quantized"
    ranges = {(grid.grid.qmin, grid.grid.qmax) for grid in grids if grid is not None}
    if ranges != {(-128, 127)}:
        return f"its input and hidden state must have 8 bits; they run over {sorted(ranges)}"
    return None


def _fuse(program: ExportedProgram, steps: _Steps, tensors: Mapping[str, QuantizedTensor]) -> None:
    """Put one node before the layer's first output, and let it make what the steps made."""
    layer = steps.layer
    (from_x,), from_h = steps.products("weight_ih_l0"), steps.products("weight_hh_l0")
    source, hidden = _quantized(from_x), _quantized(from_h[0])
    stacks = [node for node in steps.nodes if node.target is _aten.stack.default]
    constants = Constants(program)
    weights = [
        _add_weight(constants, steps, tensors[layer.key(name)])
        for name in ("weight_ih_l0", "weight_hh_l0")
    ]
    bias = _add_bias(constants, layer, from_x, from_h[0])
    batched = _value(source.x).dim() == 3
    # Of `projected.unbind(time)`.
    (unbind,) = (node for node in from_x.users if node.target is _aten.unbind.int)
    time = unbind.args[1] if len(unbind.args) > 1 else 0

    write = _Writer(program.graph, stacks[0], from_x.meta["nn_module_stack"])
    x = source.x
    if not batched:
        x = write(_aten.unsqueeze.default, x, 1)
    elif time == 1:
        x = write(_aten.transpose.int, x, 0, 1)

    def as_state(value: fx.Node) -> fx.Node:
        # A state that is a parameter of the model is made of nothing.
        whole = value.args[0] if value.args else None
        if batched and value.target is _aten.select.int and isinstance(whole, fx.Node):
            # The first of one layer's states.
            return whole
        value = write(_aten.unsqueeze.default, value, 0)
        return value if batched else write(_aten.unsqueeze.default, value, 0)

    states = [write.fake_quantize(as_state(hidden.x), hidden)]
    states += [as_state(steps.initial_cell())] if layer.kind == "LSTM" else []
    fused = getattr(torch.ops.lightning_qat_exporters, layer.kind.lower()).default
    weights = [write(node.target, *node.args) for node in weights]
    results = write(fused, write.fake_quantize(x, source), *weights, bias, *states)

    def result(number: int) -> fx.Node:
        value = write(operator.getitem, results, number)
        return value if batched or number == 0 else write(_aten.squeeze.dim, value, 1)

    def sequence() -> fx.Node:
        value = write(_aten.squeeze.dim, result(0), 1)
        if not batched:
            return write(_aten.squeeze.dim, value, 1)
        return write(_aten.transpose.int, value, 0, 1) if time == 1 else value

    for number, stack in enumerate(stacks):
        parts: Any = stack.args[0]
        dim = stack.args[1] if len(stack.args) > 1 else 0
        if len(parts) > 1 or dim == 1:
            value = sequence()
        elif layer.kind == "LSTM" and parts[0].target is _aten.add.Tensor:
            value = result(2)
        else:
            # Of one step, output and final state are equal; the layer makes the output first.
            value = sequence() if number == 0 and len(from_h) == 1 else result(1)
        stack.replace_all_uses_with(value)


class _Writer:
    """Adds nodes before an anchor, with the shapes and the module that torch.onnx wants."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node, scope: Any) -> None:
        self._graph, self._anchor, self._scope = graph, anchor, scope

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        with self._graph.inserting_before(self._anchor):
            node = self._graph.call_function(target, args)
        node.meta["nn_module_stack"] = self._scope
        node.meta["val"] = target(*fx.map_arg(args, _value))
        return node

    def fake_quantize(self, x: fx.Node, call: FakeQuantizeCall) -> fx.Node:
        """The same quantization of another tensor."""
        return self(FAKE_QUANTIZE, *call._replace(x=x).args)


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _weight_key(node: fx.Node) -> str | None:
    if node.target is not _aten.linear.default or not isinstance(node.args[1], fx.Node):
        return None
    weight = as_dequantize(node.args[1])
    return None if weight is None else weight.key


def _quantized(product: fx.Node) -> FakeQuantizeCall:
    source: Any = product.args[0]
    call = as_fake_quantize(source)
    assert call is not None  # _why_not looked
    return call


def _add_weight(constants: Constants, steps: _Steps, tensor: QuantizedTensor) -> fx.Node:
    """The ``dequantize`` node of a weight ``[1, gates * hidden, features]``."""
    assert tensor.integers is not None
    kind, before = steps.layer.kind, steps.nodes[0]
    grid, scale, axis = tensor.qparams.grid, tensor.qparams.scale, tensor.qparams.axis
    rows = in_onnx_order(kind, tensor.integers)
    integers = constants.add(f"{tensor.key}.gates", rows[None])
    scales = in_onnx_order(kind, scale) if axis is not None else scale
    written = constants.add(f"{tensor.key}.gates_scale", scales)
    new = DequantizeCall(integers, written, grid, None if axis is None else 1, tensor.key)
    with before.graph.inserting_before(before):
        node: fx.Node = before.graph.call_function(DEQUANTIZE, new.args)
    return node


def _add_bias(
    constants: Constants, layer: Recurrence, from_x: fx.Node, from_h: fx.Node
) -> fx.Node | None:
    """The biases of input and hidden state in one constant, ``[1, 2 * gates * hidden]``."""
    values = [constants.value(p.args[2]) for p in (from_x, from_h) if len(p.args) > 2]
    parts = [in_onnx_order(layer.kind, value) for value in values if value is not None]
    if not parts:
        return None
    return constants.add(f"{layer.key('bias')}.gates", torch.cat(parts)[None])


def in_onnx_order(kind: str, rows: Tensor) -> Tensor:
    """Rows of torch's gates in the order of ONNX's."""
    gates: Sequence[Tensor] = rows.chunk(len(GATES[kind]))
    return torch.cat([gates[number] for number in GATES[kind]])
