"""A QDQ model as Ascend CANN reads it, and as float operators that compute the same numbers.

``to_deploy`` writes AscendQuant, integer layers and AscendDequant; ``to_fake_quant`` the same
arithmetic in standard float operators. Both are one walk over what ``_quantized_ops`` found, with
another spelling, and end with ``Downgrade``, which brings the remaining operators to the opset that
the target's parser takes. Formats and numbers are those of Huawei AMCT, read from files that AMCT
wrote; nothing here was run on an Ascend device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from lightning_qat_exporters._downgrade import OPSETS, Downgrade
from lightning_qat_exporters._factors import FoldFactors
from lightning_qat_exporters._int4 import INPUT_AXIS, pack
from lightning_qat_exporters._quantized_ops import (
    Activation,
    Array,
    NotExpressible,
    QuantizedLayer,
    Remark,
    constant,
    find_quantized,
    real_constant,
    unique,
)
from lightning_qat_exporters._recurrent_nodes import RoundRecurrentBiases, ToDeviceNodes

_INT32 = np.iinfo(np.int32)
_CONV_OPS = ("Conv", "ConvTranspose")
_QDQ_OPS = ("QuantizeLinear", "DequantizeLinear")
_DTYPES = {ir.DataType.FLOAT: 0, ir.DataType.FLOAT16: 1}


def to_deploy(
    model: ir.Model, opset: int = 11, *, float_bias: bool = False, recurrent: bool = False
) -> ir.Model:
    """Write a QDQ model with Ascend's operators; the given model stays as it is.

    Args:
        model: QDQ model; what ``canonical`` returns, where a layer needs rewriting.
        opset: Version of the default domain, 11 to 18. A model below it stays where it is.
        float_bias: Add biases in float after the layers.
        recurrent: Write quantized LSTM and GRU as device nodes.

    Returns:
        A model with AscendQuant, AscendDequant and AscendAntiQuant in the default domain.

    Raises:
        NotExpressible: A pair, bias or operator cannot be expressed; all are named.
        ValueError: ``opset`` is outside 11 to 18.
    """
    steps = (ToDeviceNodes(),) if recurrent else ()
    return _written(model, (*steps, ToDeploy(float_bias)), opset)


def to_fake_quant(
    model: ir.Model, opset: int = 11, *, float_bias: bool = False, recurrent: bool = False
) -> ir.Model:
    """Write a QDQ model as float operators on integer values, in AMCT's form.

    ``Mul(1/scale_d) -> Round -> Add(offset) -> Clip -> Sub(offset) -> layer on integer-valued float
    weights -> Mul(scale_d * scale_w)``. Exact while an accumulator stays below 2**24.

    Args:
        model: QDQ model; what ``canonical`` returns, where a layer needs rewriting.
        opset: Version of the default domain, 11 to 18. A model below it stays where it is.
        float_bias: Add biases in float after the layers.
        recurrent: Round the biases of quantized LSTM and GRU as device nodes have them.

    Returns:
        A model of standard operators that any ONNX runtime runs.

    Raises:
        NotExpressible: A pair, bias or operator cannot be expressed; all are named.
        ValueError: ``opset`` is outside 11 to 18.
    """
    steps = (RoundRecurrentBiases(),) if recurrent else ()
    return _written(model, (*steps, ToFakeQuant(float_bias)), opset)


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


def dequant_param(layer: QuantizedLayer) -> NDArray[np.uint64]:
    """AscendDequant's parameter: the bits of float32 ``scale_d * scale_w`` as uint64.

    CANN's AscendDequant takes the low 32 bits as a float and wants the high 32 bits zero.
    """
    return layer.product_scale.view(np.uint32).astype(np.uint64)


def _written(model: ir.Model, forms: Sequence[ir.passes.InPlacePass], opset: int) -> ir.Model:
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


class _QuantizedForm(ir.passes.InPlacePass):
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
        graph = _GraphWriter(model.graph)
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
        self, graph: _GraphWriter, activation: Activation, readers: Sequence[ir.Node]
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
        self, graph: _GraphWriter, layer: QuantizedLayer, bias: NDArray[np.int32] | None
    ) -> None:
        node = layer.node
        node.name = layer.name
        attributes = {a.name: a for a in _typed(_layer_attributes(layer))}
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
                trailing = [1] * (layer.weight.ndim - 2) if node.op_type in _CONV_OPS else []
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
    def quantize(self, graph: _GraphWriter, activation: Activation, anchor: ir.Node) -> ir.Value:
        """Write the quantization before ``anchor``; return what layers read."""

    @abstractmethod
    def dequantize(
        self, graph: _GraphWriter, activation: Activation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """Write real values for readers that are no layers."""

    @abstractmethod
    def integers(
        self, graph: _GraphWriter, activation: Activation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """Return the integers themselves, for a graph output."""

    @abstractmethod
    def scale(self, graph: _GraphWriter, layer: QuantizedLayer, accumulator: ir.Value) -> ir.Value:
        """Write what makes a layer's accumulator real, after the layer."""

    @abstractmethod
    def weight(self, layer: QuantizedLayer) -> Array | ir.LazyTensor:
        """The form in which a layer's weight is stored."""

    @abstractmethod
    def operand(self, integers: Array) -> Array:
        """The type in which a layer's integers are stored."""


class ToDeploy(_QuantizedForm):
    """Ascend's spelling: AscendQuant, layers on integers, AscendDequant, AscendAntiQuant."""

    def quantize(self, graph: _GraphWriter, activation: Activation, anchor: ir.Node) -> ir.Value:
        """AscendQuant; its ``scale`` is the float32 reciprocal, as CANN multiplies by it."""
        source = activation.source
        name = activation.name
        if activation.narrowed:
            # AscendQuant saturates at its type; a smaller range is a float Clip before it.
            ends = np.array([activation.low, activation.high]) - activation.offset_d
            low, high = (ends.astype(np.float32) * activation.scale_d).astype(
                activation.real.numpy()
            )
            bounds = [
                graph.constant(f"{name}.quant.clip.min_val", low),
                graph.constant(f"{name}.quant.clip.max_val", high),
            ]
            source = graph.insert(
                anchor, "Clip", [source, *bounds], {}, f"{name}.quant.clip", dtype=activation.real
            )
        attributes = {
            "scale": float(np.float32(1) / activation.scale_d),
            "offset": float(activation.offset_d),
            "dst_type": activation.dst_type,
        }
        dtype = ir.DataType[activation.dst_type]
        return graph.insert(
            anchor, "AscendQuant", [source], attributes, f"{name}.quant", dtype=dtype
        )

    def dequantize(
        self, graph: _GraphWriter, activation: Activation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """AscendAntiQuant; its ``scale`` is scale_d itself, CANN's parser negates the offset."""
        attributes: dict[str, Any] = {
            "scale": float(activation.scale_d),
            "offset": float(activation.offset_d),
        }
        if activation.real == ir.DataType.FLOAT16:
            attributes["dtype"] = _DTYPES[activation.real]
        name = f"{activation.name}.antiquant"
        return graph.insert(
            anchor, "AscendAntiQuant", [read], attributes, name, dtype=activation.real
        )

    def integers(
        self, graph: _GraphWriter, activation: Activation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """What AscendQuant gives."""
        return read

    def scale(self, graph: _GraphWriter, layer: QuantizedLayer, accumulator: ir.Value) -> ir.Value:
        """AscendDequant to float32 (``dtype`` 0) or float16 (1)."""
        name = f"{layer.name}.dequant"
        inputs = [accumulator, graph.constant(f"{name}.param", dequant_param(layer))]
        attributes = {"dtype": _DTYPES[layer.real]}
        result = graph.insert(
            layer.node, "AscendDequant", inputs, attributes, name, dtype=layer.real, after=True
        )
        # Not .dtype: a clone shares the type object with the model it was made from.
        accumulator.type = ir.TensorType(ir.DataType.INT32)
        return result

    def weight(self, layer: QuantizedLayer) -> Array:
        """Integers as they are, or two of 4 bits in a byte."""
        if layer.wts_type == "INT4":
            return pack(layer.weight, INPUT_AXIS[layer.node.op_type])
        return layer.weight

    def operand(self, integers: Array) -> Array:
        """Integers as they are."""
        return integers


class ToFakeQuant(_QuantizedForm):
    """AMCT's float spelling of the same arithmetic."""

    def quantize(self, graph: _GraphWriter, activation: Activation, anchor: ir.Node) -> ir.Value:
        """``Mul -> Round -> Add -> Clip -> Sub``: integers around zero, as float32."""
        name = f"{activation.name}.quant.fakequant"
        numbers = {
            "scale": np.float32(1) / activation.scale_d,
            "offset": np.float32(activation.offset_d),
            "min_val": np.float32(activation.low),
            "max_val": np.float32(activation.high),
        }
        of = {key: graph.constant(f"{name}.{key}", value) for key, value in numbers.items()}
        value = activation.source
        if activation.real == ir.DataType.FLOAT16:
            value = graph.cast(anchor, value, ir.DataType.FLOAT, f"{name}.cast")
        value = graph.insert(anchor, "Mul", [value, of["scale"]], {}, f"{name}.mul")
        value = graph.insert(anchor, "Round", [value], {}, f"{name}.round")
        value = graph.insert(anchor, "Add", [value, of["offset"]], {}, f"{name}.add")
        bounds = [of["min_val"], of["max_val"]]
        value = graph.insert(anchor, "Clip", [value, *bounds], {}, f"{name}.clip")
        return graph.insert(anchor, "Sub", [value, of["offset"]], {}, f"{name}.sub")

    def dequantize(
        self, graph: _GraphWriter, activation: Activation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """``Mul(scale_d)``."""
        name = f"{activation.name}.fakeantiquant"
        scale = graph.constant(f"{name}.scale", activation.scale_d)
        value = graph.insert(anchor, "Mul", [read, scale], {}, f"{name}.mul")
        if activation.real == ir.DataType.FLOAT16:
            value = graph.cast(anchor, value, activation.real, f"{name}.cast")
        return value

    def integers(
        self, graph: _GraphWriter, activation: Activation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """What Clip gives, cast to the integer type."""
        subtract = read.producer()
        assert subtract is not None  # quantize wrote it
        clipped = subtract.inputs[0]
        assert clipped is not None
        dtype = ir.DataType[activation.dst_type]
        return graph.cast(anchor, clipped, dtype, f"{activation.name}.quant.fakequant.integers")

    def scale(self, graph: _GraphWriter, layer: QuantizedLayer, accumulator: ir.Value) -> ir.Value:
        """``Mul(scale_d * scale_w)``, the product in float32."""
        name = f"{layer.name}.fakedequant"
        trailing = layer.weight.ndim - 2 if layer.node.op_type in _CONV_OPS else 0
        # A vector stays one.
        leading = [] if accumulator.shape is not None and len(accumulator.shape) == 1 else [1]
        product = layer.product_scale.reshape(*leading, -1, *[1] * trailing)
        inputs = [accumulator, graph.constant(f"{name}.dqscale", product)]
        value = graph.insert(layer.node, "Mul", inputs, {}, f"{name}.mul", after=True)
        # Not .dtype: a clone shares the type object with the model it was made from.
        accumulator.type = ir.TensorType(ir.DataType.FLOAT)
        if layer.real == ir.DataType.FLOAT16:
            anchor = value.producer()
            assert anchor is not None  # just inserted
            value = graph.cast(anchor, value, layer.real, f"{name}.cast", after=True)
        return value

    def weight(self, layer: QuantizedLayer) -> ir.LazyTensor:
        """Integer-valued float32, computed when it is written: four times the integers' size."""
        integers = layer.weight
        return ir.LazyTensor(
            lambda: ir.Tensor(self.operand(integers)),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(integers.shape),
        )

    def operand(self, integers: Array) -> Array:
        """Integer-valued float32."""
        return integers.astype(np.float32)


def _typed(attributes: dict[str, Any]) -> list[ir.Attr]:
    """Attributes of the four types that are written here.

    ``ir.node`` infers types by protocols, which took a fifth of a conversion.
    """
    make: dict[type, Callable[[str, Any], ir.Attr]] = {
        int: ir.AttrInt64,
        float: ir.AttrFloat32,
        str: ir.AttrString,
        list: ir.AttrInt64s,
    }
    return [make[type(value)](name, value) for name, value in attributes.items()]


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


def _fold_real_constants(graph: _GraphWriter) -> bool:
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


class _GraphWriter:
    """Inserts named nodes into a graph, and constants once the names they take are free."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: list[ir.Value] = []

    def constant(self, name: str, values: Array | np.generic | ir.LazyTensor) -> ir.Value:
        tensor = values if isinstance(values, ir.LazyTensor) else ir.Tensor(np.asarray(values))
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor
        )
        self._constants.append(value)
        return value

    def insert(
        self,
        anchor: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, Any],
        name: str,
        *,
        dtype: ir.DataType = ir.DataType.FLOAT,
        after: bool = False,
    ) -> ir.Value:
        """Insert a node whose output has its first input's shape and is ``<name>.output0``."""
        output = ir.Value(name=f"{name}.output0", type=ir.TensorType(dtype), shape=inputs[0].shape)
        node = ir.Node("", op_type, inputs, _typed(attributes), outputs=[output], name=name)
        (self.graph.insert_after if after else self.graph.insert_before)(anchor, node)
        return output

    def cast(
        self,
        anchor: ir.Node,
        value: ir.Value,
        to: ir.DataType,
        name: str,
        *,
        after: bool = False,
    ) -> ir.Value:
        """Insert a Cast."""
        return self.insert(anchor, "Cast", [value], {"to": int(to)}, name, dtype=to, after=after)

    def take_over(
        self,
        old: ir.Value,
        new: ir.Value,
        anchor: ir.Node,
        uses: Sequence[tuple[ir.Node, int]] | None = None,
    ) -> None:
        """Let ``new`` replace ``old`` in its uses and as a graph output, which keeps its name.

        Without ``uses`` they are all but that of the producer of ``new``.
        """
        if old.is_graph_output() and (new.is_graph_output() or new.producer() is None):
            new = self.insert(anchor, "Identity", [new], {}, f"{new.name}.copy", dtype=_type(new))
        if old.is_graph_output():
            new.name, old.name = old.name, None
        for user, index in old.uses() if uses is None else uses:
            if user is not new.producer():
                user.replace_input_with(index, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[index] = new

    def register_constants(self) -> None:
        taken = {v.name for v in (*self.graph.inputs, *self.graph.initializers.values()) if v.name}
        taken |= {v.name for node in self.graph for v in node.outputs if v.name}
        for value in self._constants:
            if value.uses():
                assert value.name is not None
                value.name = unique(value.name, taken)
                self.graph.register_initializer(value)


def _type(value: ir.Value) -> ir.DataType:
    return value.dtype or ir.DataType.FLOAT
