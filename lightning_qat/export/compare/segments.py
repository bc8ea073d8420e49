"""What lies between the quantized tensors of a converted model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from lightning_qat.ir.exported_program import Constants
from lightning_qat.ir.ops import as_dequantize, as_fake_quantize
from lightning_qat.ir.quantized_model import QuantizedLayer, QuantizedModel


@dataclass(frozen=True, eq=False)
class Segment:
    """What computes one tensor from the quantized tensors before it.

    Args:
        name: Name of the tensor's quantization (``QuantizeCall.name``), or of an output that is
            not quantized.
        layers: The layers in between, in the order of the graph.
        operators: The other operators in between, by ``aten``'s names.
    """

    name: str
    layers: tuple[QuantizedLayer, ...]
    operators: tuple[str, ...]

    @property
    def made_by(self) -> str:
        """The layers by name; the operators where there are none; ``input`` where nothing is."""
        names = dict.fromkeys(layer.name or "layer" for layer in self.layers)
        return ", ".join(names or dict.fromkeys(self.operators)) or "input"


def segments(model: QuantizedModel) -> Mapping[str, Segment]:
    """The segment of every quantized tensor, and of every output that is none, by name."""
    layers = {layer.node: layer for layer in model.layers}
    constants = Constants(model.program)
    position = {node: i for i, node in enumerate(model.program.graph.nodes)}

    def segment(name: str, last: fx.Node) -> Segment:
        between: set[fx.Node] = set()
        waiting = [last]
        while waiting:
            node = waiting.pop()
            ends = node.op == "placeholder" or as_fake_quantize(node) or as_dequantize(node)
            if node in between or ends or constants.name(node) is not None:
                continue
            between.add(node)
            waiting += node.all_input_nodes
        ordered = sorted(between, key=position.__getitem__)
        found = tuple(layers[node.name] for node in ordered if node.name in layers)
        others = tuple(_operator(node) for node in ordered if node.name not in layers)
        return Segment(name, found, others)

    found = {}
    for call in model.calls:
        quantization = as_fake_quantize(call.node)
        assert quantization is not None
        found[call.name] = segment(call.name, quantization.x)
    outputs: Any = model.program.graph.output_node().args[0]
    tensors = [node for node in outputs if isinstance(node, fx.Node)]
    for name, node in zip(model.output_names, tensors, strict=True):
        if as_fake_quantize(node) is None:
            found[name] = segment(name, node)
    return found


def _operator(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", node.name))
