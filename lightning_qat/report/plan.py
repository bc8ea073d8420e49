"""The plan of a converted model as a graph of boxes: calls, and the tensors between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx

from lightning_qat.export.promises import JOINS, aten_name, key_behind, operands_of
from lightning_qat.ir.exported_program import Constants, module_path
from lightning_qat.ir.ops import as_dequantize, as_fake_quantize
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.report.activations import bits_of
from lightning_qat.report.data import Arrow, Box, Plan

_MOST = 4
"""So many operators are named in a box."""


@dataclass(eq=False)
class _Chain:
    """The nodes of one box."""

    number: int
    nodes: list[fx.Node] = field(default_factory=list)
    kind: Literal["input", "output"] | None = None


def plan_of(model: QuantizedModel) -> Plan:
    """The graph without constants; what one call alone reads in float is in its box."""
    return _Builder(model).plan()


class _Builder:
    def __init__(self, model: QuantizedModel) -> None:
        self._model = model
        self._constants = Constants(model.program)
        self._names = {call.node: call.name for call in model.calls}
        self._rows = {layer.node: row for row, layer in enumerate(model.layers)}
        self._layers = {layer.node: layer for layer in model.layers}
        self._chains: list[_Chain] = []
        self._of: dict[fx.Node, _Chain] = {}
        self._arrows: dict[tuple[int, int, str], Arrow] = {}

    def plan(self) -> Plan:
        graph = self._model.program.graph
        for node in graph.nodes:
            if node.op == "placeholder" and self._constants.name(node) is None:
                self._open(node, kind="input")
            elif node.op == "call_function" and not _is_quantization(node):
                self._place(node)
        for output in graph.output_node().all_input_nodes:
            self._output(output)
        # An input that nothing reads has none.
        used = {n for arrow in self._arrows.values() for n in (arrow.start, arrow.end)}
        kept = [chain for chain in self._chains if chain.number in used]
        renamed = {chain.number: number for number, chain in enumerate(kept)}
        arrows = (
            Arrow(renamed[a.start], renamed[a.end], a.tensor, a.bits) for a in self._arrows.values()
        )
        return Plan(tuple(self._box(chain) for chain in kept), tuple(arrows))

    def _open(self, *nodes: fx.Node, kind: Literal["input", "output"] | None = None) -> _Chain:
        chain = _Chain(len(self._chains), [*nodes], kind)
        self._chains.append(chain)
        self._of.update(dict.fromkeys(nodes, chain))
        return chain

    def _place(self, node: fx.Node) -> None:
        """Into the box of what it reads, or into one of its own; constants have none."""
        sources = [*self._sources(node)]
        if not sources or not _has_tensors(node):
            return
        (source, name), *others = sources
        chain = self._of[source]
        last = chain.nodes[-1]
        readers = [user for user in last.users if user.op != "output" and _has_tensors(user)]
        if not others and not name and chain.kind is None and source is last and len(readers) == 1:
            chain.nodes.append(node)
            self._of[node] = chain
            return
        self._connect(sources, self._open(node))

    def _output(self, node: fx.Node) -> None:
        sources = [*self._through(node)]
        if sources:
            self._connect(sources, self._open(kind="output"))

    def _connect(self, sources: list[tuple[fx.Node, str]], chain: _Chain) -> None:
        end = chain.number
        for source, name in sources:
            start = self._of[source].number
            key = name.partition("@")[0]
            bits = bits_of(self._model.tensors[key].qparams.grid) if name else 0
            self._arrows.setdefault((start, end, name), Arrow(start, end, name, bits))

    def _sources(self, node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
        """What a node reads, each with the name of its last quantization."""
        for read in node.all_input_nodes:
            yield from self._through(read)

    def _through(self, node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
        name = ""
        while (quantization := as_fake_quantize(node)) is not None:
            name = name or self._names[node]
            node = quantization.x
        if node in self._of:
            yield node, name

    def _box(self, chain: _Chain) -> Box:
        if chain.kind == "output":
            return Box("output", "", "output")
        if chain.kind == "input":
            return Box(chain.nodes[0].name, "input", "input")
        layers = [self._layers[n.name] for n in chain.nodes if n.name in self._layers]
        operators = [_operator(node) for node in chain.nodes]
        shown = list(dict.fromkeys(operators))
        detail = " · ".join(shown[:_MOST]) + (" …" if len(shown) > _MOST else "")
        row = self._rows[layers[0].node] if len(layers) == 1 else None
        call = f"{module_path(chain.nodes[0])}.{operators[0]}".lstrip(".")
        label = ", ".join(layer.name or "layer" for layer in layers) or call
        return Box(label, detail, self._kind(chain), row)

    def _kind(self, chain: _Chain) -> Literal["integer", "float", "other"]:
        """How the first call of a box computes that does not merely hand values on."""
        for node in chain.nodes:
            operator = JOINS.get(aten_name(node))
            if node.name in self._layers:
                return "integer"
            if operator is not None:
                keys = [key_behind(operand) for operand in operands_of(node, operator)]
                return "float" if None in keys else "integer"
        return "other"


def _is_quantization(node: fx.Node) -> bool:
    return as_fake_quantize(node) is not None or as_dequantize(node) is not None


def _has_tensors(node: fx.Node) -> bool:
    """Whether a node computes tensors; sizes of a batch are none."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(item, Tensor) for item in values)


def _operator(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", getattr(node.target, "__name__", node.name)))
