"""The walk that rewrites a QDQ model: to a deploy model, or to a fake-quant model.

``deploy.py`` and ``fake_quant.py`` say what stands for a pair and for a layer; this file replaces
every pair and layer, and ends with ``Downgrade``, which brings the remaining operators to the opset
that the target's parser takes. Formats and numbers are those of Huawei AMCT, read from files that
AMCT wrote; nothing here was run on an Ascend device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from lightning_qat.export.protocol import Array, Unsupported, UnsupportedByTarget
from lightning_qat_exporters.cann.downgrade_opset import OPSETS, Downgrade
from lightning_qat_exporters.cann.qdq_graph.constants import constant
from lightning_qat_exporters.cann.qdq_graph.qparams import qparams_of
from lightning_qat_exporters.cann.qdq_graph.quantized_constants import real_constant
from lightning_qat_exporters.cann.qdq_graph.types import (
    TARGET,
    IntegerLayer,
    QuantizedActivation,
    QuantizedGraph,
)
from lightning_qat_exporters.onnx_files.graph_writer import GraphWriter, typed

_INT32 = np.iinfo(np.int32)
_QDQ_OPS = ("QuantizeLinear", "DequantizeLinear")
CONV_OPS = ("Conv", "ConvTranspose")


def integer_bias(layer: IntegerLayer) -> NDArray[np.int32] | None:
    """The bias in steps of the accumulator: ``rint(bias / (scale_d * scale_w))``.

    The product is taken in float32, the division in float64, ties go to even: AMCT's biases, to
    the last integer.

    Raises:
        UnsupportedByTarget: A channel is outside int32; every such channel is named.
    """
    exact = layer.bias_steps
    if layer.bias is None or exact is None:
        return None
    steps = np.rint(exact)
    fits = (steps >= _INT32.min) & (steps <= _INT32.max)
    if not fits.all():
        step = np.broadcast_to(layer.accumulator_scale.astype(np.float64), steps.shape)
        raise UnsupportedByTarget(
            TARGET,
            [
                Unsupported(
                    layer.name,
                    f"the bias of channel {channel}, in steps of scale_d * scale_w, must fit "
                    f"int32; got {steps[channel]:.0f} (bias {layer.bias[channel]:.6g}, step "
                    f"{step[channel]:.6g})",
                    "Widen the range of the layer's input or weight, or exclude the layer",
                )
                for channel in np.flatnonzero(~fits)
            ],
        )
    return steps.astype(np.int32)


NEEDED_BY = "lightning_qat.opset_needed_by"
"""Where a rewritten model's ``meta`` has what kept it from the first of ``OPSETS``."""


def rewritten(found: QuantizedGraph, form: QuantizedForm, opset: int | None) -> ir.Model:
    """A rewritten copy of the model that was matched.

    Args:
        found: The model and what is quantized in it.
        form: What stands for pairs and layers.
        opset: Version of the default domain; ``None``: the lowest that expresses the model. What
            needs more than the first of ``OPSETS`` is in ``meta[NEEDED_BY]`` of the result.

    Raises:
        UnsupportedByTarget: A pair, bias or operator cannot be expressed; all are named.
        ValueError: ``opset`` is outside 11 to 18.
    """
    if opset is not None and opset not in OPSETS:
        raise ValueError(
            f"The opset must be from {OPSETS[0]} to {OPSETS[-1]}, which is what CANN's parsers "
            f"take; got {opset!r}. Leave it out for the lowest that expresses the model."
        )
    copy = found.copied()
    form.rewrite(copy)
    downgrade = Downgrade(opset)
    for step in (
        downgrade,
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
        common.NameFixPass(),
    ):
        step(copy.model)
    copy.model.meta[NEEDED_BY] = downgrade.needed_by
    return copy.model


class QuantizedForm(ABC):
    """Replaces the Q/DQ pairs and quantized layers of a model; subclasses write the replacement.

    Args:
        float_bias: Keep biases in float and add them after the layers.
    """

    def __init__(self, *, float_bias: bool) -> None:
        self.float_bias = float_bias

    def rewrite(self, found: QuantizedGraph) -> None:
        """Rewrite the model of ``found`` in place.

        Raises:
            UnsupportedByTarget: A pair or bias cannot be expressed; all are named.
        """
        problems = list(found.problems)
        biases: dict[str, NDArray[np.int32] | None] = {}
        for layer in found.layers:
            try:
                biases[layer.name] = None if self.float_bias else integer_bias(layer)
            except UnsupportedByTarget as error:
                problems += error.problems
        if problems:
            raise UnsupportedByTarget(TARGET, problems)
        found = self.rewrite_recurrent(found)
        model = found.model
        graph = GraphWriter(model.graph)
        readers: dict[QuantizedActivation, list[ir.Node]] = {}
        for layer in found.layers:
            readers.setdefault(layer.activation, []).append(layer.node)
        for activation in found.activations:
            self._activation(graph, activation, readers.get(activation, []))
        for layer in found.layers:
            self._layer(graph, layer, biases[layer.name])
        # What layers took is gone before the rest is computed: it may be all the weights.
        common.RemoveUnusedNodesPass()(model)
        if _fold_real_constants(graph):
            common.RemoveUnusedNodesPass()(model)
        graph.register_constants()
        _require_no_pairs(model)

    @abstractmethod
    def rewrite_recurrent(self, found: QuantizedGraph) -> QuantizedGraph:
        """Rewrite the LSTM and GRU that were matched; return what is quantized afterwards."""

    def _activation(
        self, graph: GraphWriter, activation: QuantizedActivation, readers: Sequence[ir.Node]
    ) -> None:
        # Behind another pair the tensor is another one by now: what stands for that pair.
        source = activation.quantizes[0].inputs[0]
        assert source is not None  # QuantizeLinear's first input is not optional
        activation = replace(activation, source=source)
        read = self.quantize(graph, activation, activation.quantizes[0])
        for layer_node in readers:
            layer_node.replace_input_with(0, read)
        real: ir.Value | None = None
        for node in activation.dequantizes:
            old = node.outputs[0]
            _drop_unread_casts(old)
            if old.uses() or old.is_graph_output():
                if real is None:
                    real = self.dequantize(graph, activation, read, node)
                graph.replace(old, real, node)
        for node in activation.quantizes:
            # A graph output of integers with a narrower range is the output of the Clip.
            last = next((n for n in node.outputs[0].consumers() if n.op_type == "Clip"), node)
            if last.outputs[0].is_graph_output():
                integers = self.integers(graph, activation, read, last)
                integers = _in_the_type_of(graph, node, integers, last)
                graph.replace(last.outputs[0], integers, last)

    def _layer(
        self, graph: GraphWriter, layer: IntegerLayer, bias: NDArray[np.int32] | None
    ) -> None:
        node = layer.node
        node.name = layer.name
        if node.op_type == "Gemm" and bias is None:
            # AMCT, and torch's exporter, write a Linear without a bias so.
            node.op_type = "MatMul"
        attributes = {a.name: a for a in typed(_layer_attributes(layer))}
        node.attributes.clear()
        node.attributes.update(attributes)
        weight = self.weight(layer)
        node.replace_input_with(1, graph.constant(f"{layer.name}.weight", weight))
        if bias is not None:
            node.replace_input_with(2, graph.constant(f"{layer.name}.bias", self.operand(bias)))
        accumulator = node.outputs[0]
        readers = tuple(accumulator.uses())
        result = self.scale(graph, layer, accumulator)
        if layer.bias is not None and bias is None:
            real_bias = layer.bias.astype(layer.real.numpy())
            if layer.add is not None:
                side = 1 if layer.add.inputs[0] is accumulator else 0
                real = graph.constant(f"{layer.name}.bias", real_bias)
                layer.add.replace_input_with(side, real)
            else:
                node.resize_inputs(2)
                trailing = [1] * (layer.weight.ndim - 2) if node.op_type in CONV_OPS else []
                real = graph.constant(f"{layer.name}.bias", real_bias.reshape(-1, *trailing))
                anchor = result.producer()
                assert anchor is not None  # scale wrote it
                result = graph.insert(
                    anchor,
                    "Add",
                    [result, real],
                    {},
                    f"{layer.name}.add_bias",
                    dtype=layer.real,
                    after=True,
                )
        graph.replace(accumulator, result, node, readers)
        accumulator.name = f"{layer.name}_output0"

    @abstractmethod
    def quantize(
        self, graph: GraphWriter, activation: QuantizedActivation, anchor: ir.Node
    ) -> ir.Value:
        """Write the quantization before ``anchor``; return what layers read."""

    @abstractmethod
    def dequantize(
        self, graph: GraphWriter, activation: QuantizedActivation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """Write real values for readers that are no layers."""

    @abstractmethod
    def integers(
        self, graph: GraphWriter, activation: QuantizedActivation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """Return the integers themselves, for a graph output."""

    @abstractmethod
    def scale(self, graph: GraphWriter, layer: IntegerLayer, accumulator: ir.Value) -> ir.Value:
        """Write what makes a layer's accumulator real, after the layer."""

    @abstractmethod
    def weight(self, layer: IntegerLayer) -> Array | ir.LazyTensor:
        """The form in which a layer's weight is stored."""

    @abstractmethod
    def operand(self, integers: Array) -> Array:
        """The type in which a layer's integers are stored."""


def _in_the_type_of(
    graph: GraphWriter, quantize: ir.Node, integers: ir.Value, anchor: ir.Node
) -> ir.Value:
    """Integers of a device, which are signed, in the type of the model's own output.

    They are cast by way of float32, which holds all of them: CANN has no Add of uint8.
    """
    dtype = qparams_of(quantize).dtype
    if np.issubdtype(dtype, np.signedinteger):
        return integers
    name = f"{quantize.outputs[0].name or quantize.name}.unsigned"
    half = np.float32(1 << (8 * dtype.itemsize - 1))
    real = graph.cast(anchor, integers, ir.DataType.FLOAT, f"{name}.real")
    constants = [graph.constant(f"{name}.half", half)]
    shifted = graph.insert(anchor, "Add", [real, *constants], {}, f"{name}.add")
    return graph.cast(anchor, shifted, ir.DataType.from_numpy(dtype), name)


def _require_no_pairs(model: ir.Model) -> None:
    inside = [node for node in model.graph.all_nodes() if node.op_type in _QDQ_OPS]
    if inside:
        raise UnsupportedByTarget(
            TARGET,
            [
                Unsupported(
                    node.name or node.op_type,
                    "a Q/DQ pair must not be inside a subgraph",
                    "Take it out of the branch or loop",
                )
                for node in inside
            ],
        )


def _layer_attributes(layer: IntegerLayer) -> dict[str, Any]:
    """A layer's attributes, all written out as AMCT does."""
    node = layer.node
    if node.op_type == "Gemm":
        return {"alpha": 1.0, "beta": 1.0, "transB": 0}
    if node.op_type == "MatMul":
        return {}
    kernel = list(layer.weight.shape[2:])
    ones = [1] * len(kernel)
    old = node.attributes
    attributes: dict[str, Any] = {
        "dilations": list(old.get_ints("dilations", ones)),
        "group": old.get_int("group", 1),
        "kernel_shape": kernel,
    }
    auto_pad = old.get_string("auto_pad", "NOTSET")
    if auto_pad == "NOTSET":
        attributes["pads"] = list(old.get_ints("pads", [0] * 2 * len(kernel)))
    else:
        attributes["auto_pad"] = auto_pad
    attributes["strides"] = list(old.get_ints("strides", ones))
    for name in ("output_padding", "output_shape"):
        values = list(old.get_ints(name, ()))
        if any(values):
            attributes[name] = values
    return attributes


def _fold_real_constants(graph: GraphWriter) -> bool:
    """Write quantized constants that no integer layer took as real initializers.

    Returns:
        Whether there were any; their nodes are left unused.
    """
    folded = False
    for node in graph.graph:
        read = node.outputs[0].uses() or node.outputs[0].is_graph_output()
        # What integer layers took has no readers left, and may be most of the model.
        if node.op_type == "DequantizeLinear" and read:
            real = real_constant(node.outputs[0])
            if real is not None:
                old = node.outputs[0]
                name = old.name or "weight"
                scale = constant(node.inputs[1])
                assert scale is not None  # real_constant read it
                kind = scale.dtype
                if "output_dtype" in node.attributes:
                    kind = ir.DataType(node.attributes.get_int("output_dtype")).numpy()
                graph.replace(old, graph.constant(name, real.astype(kind)), node)
                folded = True
    return folded


def _drop_unread_casts(value: ir.Value) -> None:
    """Remove what stood between a pair and its layers and is read by nothing any more."""
    casts, waiting = [], [value]
    while waiting:
        for node in waiting.pop().consumers():
            if node.op_type in ("Cast", "Identity") and not node.outputs[0].is_graph_output():
                casts.append(node)
                waiting.append(node.outputs[0])
    for node in reversed(casts):
        if not node.outputs[0].uses() and node.graph is not None:
            node.graph.remove(node, safe=True)
