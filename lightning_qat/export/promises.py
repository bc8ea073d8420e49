"""What a converted model promises to compute on integers, and what a file keeps of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from lightning_qat.export.protocol import Artifact
from lightning_qat.ir.exported_program import module_path
from lightning_qat.ir.operators import OPERATORS, Operator, value_preserving
from lightning_qat.ir.ops import key_of
from lightning_qat.ir.quantized_model import QuantizedModel

JOINS: Mapping[str, Operator] = {
    name: operator
    for operator in OPERATORS
    if operator.trait in ("inputs_quantizable", "concat")
    for name in operator.aten
}
_MOST = 5
"""So many modules are named in one sentence."""
_VALUE_PRESERVING = frozenset(value_preserving("aten"))


class Promise(NamedTuple):
    """A layer or a join whose operands the recipe quantizes.

    Args:
        place: Dotted path of the layer, or of the module that makes the call; empty for the root.
        function: ``layer``, or the name of the join's operator.
        keys: The weight of a layer; every operand of a join.
    """

    place: str
    function: str
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        """The layer, or the join in its module: ``block.add``."""
        if self.function == "layer":
            return self.place or "layer"
        return f"{self.place}.{self.function}" if self.place else self.function


def promises_of(model: QuantizedModel) -> tuple[Promise, ...]:
    """Every layer and every join of a model whose operands are quantized, in the graph's order.

    A recurrent layer counts by its products alone: its gates are float in every file.
    """
    layers = {layer.node: layer for layer in model.layers}
    recurrent = {call.name for call in model.recurrences}
    found = []
    for node in model.program.graph.nodes:
        layer = layers.get(node.name)
        if layer is not None:
            found.append(Promise(layer.name, "layer", (layer.weight_key,)))
            continue
        operator = JOINS.get(aten_name(node))
        if operator is None or module_path(node) in recurrent:
            continue
        keys = tuple(key_behind(operand) for operand in operands_of(node, operator))
        if keys and None not in keys:
            read = tuple(dict.fromkeys(str(key) for key in keys))
            found.append(Promise(module_path(node), operator.name, read))
    return tuple(found)


class FloatCall(NamedTuple):
    """A layer or a join that computes in float.

    Args:
        place: Dotted path of the module that makes the call; empty for the root.
        function: The name of its operator.
        operands: How many tensors it reads.
        in_float: How many of them are not quantized.
    """

    place: str
    function: str
    operands: int
    in_float: int


def float_calls(model: QuantizedModel) -> tuple[FloatCall, ...]:
    """Every layer and every join of a model that reads a tensor in float, in the graph's order.

    What depends on constants alone is left out, and so are the gates of recurrent layers.
    """
    layers = {layer.node for layer in model.layers}
    recurrent = {call.name for call in model.recurrences}
    found = []
    for node in model.program.graph.nodes:
        operator = None if node.name in layers else JOINS.get(aten_name(node))
        if operator is None or module_path(node) in recurrent:
            continue
        keys = [key_behind(operand) for operand in operands_of(node, operator)]
        if None in keys:
            found.append(FloatCall(module_path(node), operator.name, len(keys), keys.count(None)))
    return tuple(found)


def broken_promises(model: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
    """What a file does not compute on integers although the model promises it, in words.

    Args:
        model: The converted model that the files were made of.
        artifact: The files. Those whose exporter does not say what it wrote as integers keep every
            promise, for all that is known.

    Returns:
        One sentence per layer and one per operator of joins; what a note of the exporter's names is
        left out. What the captured forward never reaches, and what depends on no input, have
        sentences of their own.
    """
    told = [
        f"{key}: planned, but the exported forward does not reach it, so no file holds it."
        for key in model.unreached
    ]
    told += [
        f"{layer}: depends on no input, so files hold its result as a constant."
        for layer in model.constant_layers
    ]
    if artifact.integers is None:
        return tuple(told)
    joins: dict[str, list[str]] = {}
    for promise in promises_of(model):
        if artifact.integers.issuperset(promise.keys):
            continue
        if promise.function != "layer":
            joins.setdefault(promise.function, []).append(promise.place or "the model's forward")
        elif not any(_names(note, promise.name) for note in artifact.notes):
            told.append(f"{promise.name}: planned on integers, computed in float in the file.")
    for function, places in joins.items():
        where = list(dict.fromkeys(places))
        more = f" and {len(where) - _MOST} more" if len(where) > _MOST else ""
        told.append(
            f"{function}: {len(places)} planned on integers, computed in float on rounded values "
            f"({', '.join(where[:_MOST])}{more})."
        )
    return tuple(dict.fromkeys(told))


def with_broken_promises(model: QuantizedModel, artifact: Artifact) -> Artifact:
    """An artifact that says what differs from the plan."""
    return replace(artifact, differences=broken_promises(model, artifact))


def _names(note: str, layer: str) -> bool:
    """Whether a note is about a layer."""
    return note.startswith((f"{layer}:", f"{layer!r}:"))


def aten_name(node: fx.Node) -> str:
    """The name of a node's ATen operator; empty for another node."""
    packet: Any = getattr(node.target, "overloadpacket", None)
    in_aten = isinstance(packet, torch._ops.OpOverloadPacket)
    return packet.__name__ if node.op == "call_function" and in_aten else ""


def operands_of(node: fx.Node, operator: Operator) -> Iterator[fx.Node]:
    """The operands that are tensors of their own; a number is none."""
    args: Any = node.args[operator.first : operator.first + operator.operands]
    for arg in args[0] if operator.trait == "concat" else args:
        if isinstance(arg, fx.Node):
            yield arg


def key_behind(node: fx.Node) -> str | None:
    """The key of the quantization that a tensor has passed, also before it was reshaped."""
    while (key := key_of(node)) is None:
        if aten_name(node) not in _VALUE_PRESERVING or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return key
