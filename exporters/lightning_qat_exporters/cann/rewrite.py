"""A QDQ model as Ascend CANN reads it, and as float operators that compute the same numbers.

``to_deploy`` writes AscendQuant, integer layers and AscendDequant; ``to_fake_quant`` the same
arithmetic in standard float operators. Both are one walk over what ``_quantized_ops`` found, with
another spelling, and end with ``Downgrade``, which brings the remaining operators to the opset that
the target's parser takes. Formats and numbers are those of Huawei AMCT, read from files that AMCT
wrote; nothing here was run on an Ascend device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from lightning_qat_exporters.cann.downgrade_opset import OPSETS, Downgrade
from lightning_qat_exporters.cann.graph_writer import GraphWriter, typed
from lightning_qat_exporters.cann.normalize.fold_qparams import FoldFactors
from lightning_qat_exporters.cann.qdq_graph.constants import constant, real_constant
from lightning_qat_exporters.cann.qdq_graph.match import find_quantized
from lightning_qat_exporters.cann.qdq_graph.types import (
    Activation,
    Array,
    NotExpressible,
    QuantizedLayer,
    Remark,
)

_INT32 = np.iinfo(np.int32)
CONV_OPS = ("Conv", "ConvTranspose")
_QDQ_OPS = ("QuantizeLinear", "DequantizeLinear")


def integer_bias(layer: QuantizedLayer) -> NDArray[np.int32] | None:
    """The bias in steps of the accumulator: ``rint(bias / (scale_d * scale_w))``.

    The product is taken in float32, the division in float64, ties go to even: AMCT's biases, to
    the last integer.

    Raises:
        NotExpressible: A channel is outside int32; every such channel is named.
    """
    if layer.bias is None or layer.add is not None:
        return None
    step = layer.product_scale.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.rint(layer.bias.astype(np.float64) / step)
    fits = (steps >= _INT32.min) & (steps <= _INT32.max)
    if not fits.all():
        step = np.broadcast_to(step, steps.shape)
        raise NotExpressible(
            [
                Remark(
                    layer.name,
                    f"the bias of channel {channel}, in steps of scale_d * scale_w, must fit "
                    f"int32; got {steps[channel]:.0f} (bias {layer.bias[channel]:.6g}, step "
                    f"{step[channel]:.6g})",
                    "Widen the range of the layer's input or weight, or exclude the layer",
                )
                for channel in np.flatnonzero(~fits)
            ]
        )
    return steps.astype(np.int32)


def rewritten(model: ir.Model, forms: Sequence[ir.passes.InPlacePass], opset: int) -> ir.Model:
    if opset not in OPSETS:
        raise ValueError(
            f"The opset must be from {OPSETS[0]} to {OPSETS[-1]}, which is what CANN's parsers "
            f"take; got {opset!r}. Use 11 unless an operator needs more."
        )
    written = model.clone()
    for step in (
        common.InlinePass(),
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        FoldFactors(),
        *forms,
        Downgrade(opset),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
        common.NameFixPass(),
    ):
        step(written)
    return written


class QuantizedForm(ir.passes.InPlacePass):
    """Replace the Q/DQ pairs and quantized layers of a model; subclasses spell the replacement."""

    def __init__(self, float_bias: bool) -> None:
        """Remember where biases go."""
        super().__init__()
        self.float_bias = float_bias

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        found = find_quantized(model)
        problems = list(found.problems)
        biases: dict[str, NDArray[np.int32] | None] = {}
        for layer in found.layers:
            try:
                biases[layer.name] = None if self.float_bias else integer_bias(layer)
            except NotExpressible as error:
                problems += error.problems
        if problems:
            raise NotExpressible(problems)
        graph = GraphWriter(model.graph)
        readers: dict[Activation, list[ir.Node]] = {}
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
        inside = [n for n in model.graph.all_nodes() if n.op_type in _QDQ_OPS]
        if inside:
            raise NotExpressible(
                [
                    Remark(
                        n.name or n.op_type,
                        "a Q/DQ pair must not be inside a subgraph or read another pair",
                        "Take it out of the branch or loop",
                    )
                    for n in inside
                ]
            )
        return ir.passes.PassResult(model, modified=bool(found.activations or found.layers))

    def _activation(
        self, graph: GraphWriter, activation: Activation, readers: Sequence[ir.Node]
    ) -> None:
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
                graph.take_over(old, real, node)
        for node in activation.quantizes:
            # A narrowed grid's integers leave the model behind the Clip.
            last = next((n for n in node.outputs[0].consumers() if n.op_type == "Clip"), node)
            if last.outputs[0].is_graph_output():
                integers = self.integers(graph, activation, read, last)
                graph.take_over(last.outputs[0], integers, last)

    def _layer(
        self, graph: GraphWriter, layer: QuantizedLayer, bias: NDArray[np.int32] | None
    ) -> None:
        node = layer.node
        node.name = layer.name
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
        graph.take_over(accumulator, result, node, readers)
        accumulator.name = f"{layer.name}_output0"

    @abstractmethod
    def quantize(self, graph: GraphWriter, activation: Activation, anchor: ir.Node) -> ir.Value:
        """Write the quantization before ``anchor``; return what layers read."""

    @abstractmethod
    def dequantize(
        self, graph: GraphWriter, activation: Activation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """Write real values for readers that are no layers."""

    @abstractmethod
    def integers(
        self, graph: GraphWriter, activation: Activation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """Return the integers themselves, for a graph output."""

    @abstractmethod
    def scale(self, graph: GraphWriter, layer: QuantizedLayer, accumulator: ir.Value) -> ir.Value:
        """Write what makes a layer's accumulator real, after the layer."""

    @abstractmethod
    def weight(self, layer: QuantizedLayer) -> Array | ir.LazyTensor:
        """The form in which a layer's weight is stored."""

    @abstractmethod
    def operand(self, integers: Array) -> Array:
        """The type in which a layer's integers are stored."""


def _layer_attributes(layer: QuantizedLayer) -> dict[str, Any]:
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
                graph.take_over(old, graph.constant(name, real.astype(kind)), node)
                folded = True
    return folded


def _drop_unread_casts(value: ir.Value) -> None:
    """Remove what stood between a pair and its layers and is read by nothing any more."""
    for node in tuple(value.consumers()):
        if node.op_type in ("Cast", "Identity") and not node.outputs[0].is_graph_output():
            _drop_unread_casts(node.outputs[0])
            if not node.outputs[0].uses() and node.graph is not None:
                node.graph.remove(node, safe=True)
