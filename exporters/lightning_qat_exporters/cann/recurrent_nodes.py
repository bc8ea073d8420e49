"""LSTM and GRU of a QDQ model as the device nodes that Huawei AMCT writes for them.

An ONNX ``LSTM`` or ``GRU`` whose input, initial hidden state and weights are all quantized becomes
``BasicLSTMInplaceFillWindowCache`` or ``BasicGRUInplaceFillWindowCache``. Names, attributes and
numbers are those of files that AMCT wrote. Best effort: Huawei's documents list the nodes for no
current product, and their kernels for sequences of one step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from lightning_qat_exporters.cann.qdq_graph.constants import (
    real_constant,
    stored_integers,
    usable_scale,
)
from lightning_qat_exporters.cann.qdq_graph.match import find_quantized
from lightning_qat_exporters.cann.qdq_graph.names import label
from lightning_qat_exporters.cann.qdq_graph.types import (
    RECURRENT_OPS,
    Activation,
    Array,
    Mismatch,
    QuantizedGraph,
    Remark,
)
from lightning_qat_exporters.qdq.initializers import initializer

_INT8, _INT32 = np.iinfo(np.int8), np.iinfo(np.int32)
_GATES = {"LSTM": 4, "GRU": 3}
# Attributes that the device node has one value for, and ONNX's default.
_FIXED: dict[str, Any] = {
    "direction": ("forward", "forward"),
    "layout": (0, 0),
    "input_forget": (0, 0),
    "linear_before_reset": (1, 0),
    "clip": (None, None),
    "activations": (None, None),
    "activation_alpha": (None, None),
    "activation_beta": (None, None),
}


@dataclass(frozen=True, eq=False)
class QuantizedRecurrent:
    """An LSTM or GRU on integers; rows are gates in ONNX's order times hidden features.

    Attributes:
        name: The layer's name.
        node: The ``LSTM`` or ``GRU``.
        x: The grid of its input.
        h: The grid of its hidden state, which it reads its initial state on.
        weight: Integers ``[1, gates * hidden, features]``.
        recurrent: Integers ``[1, gates * hidden, hidden]``.
        scale_w: Real size of one step of ``weight``, per row or per gate.
        scale_r: Real size of one step of ``recurrent``, per row or per gate.
        bias: Integers ``[1, 2 * gates * hidden]``, or None.
        steps: Length of the sequence, where the model fixes it.
    """

    name: str
    node: ir.Node
    x: Activation
    h: Activation
    weight: NDArray[np.int8]
    recurrent: NDArray[np.int8]
    scale_w: NDArray[np.float32]
    scale_r: NDArray[np.float32]
    bias: NDArray[np.int32] | None
    steps: int | None

    @property
    def op_type(self) -> str:
        """The device node's operator."""
        return f"Basic{self.node.op_type}InplaceFillWindowCache"

    @property
    def product_scale(self) -> NDArray[np.float32]:
        """``scale_d * scale_w`` and behind it ``scale_h * scale_r``, in float32."""
        return np.concatenate((self.x.scale_d * self.scale_w, self.h.scale_d * self.scale_r))

    @property
    def note(self) -> str:
        """What a reader of the file must know."""
        length = "one whose length is not fixed" if self.steps is None else f"one of {self.steps}"
        remarks = [
            f"{self.name!r}: written as {self.op_type}, best effort: no current product supports "
            "it by Huawei's documents, and kernels require a sequence length of 1; this is "
            f"{length}."
        ]
        if self.steps != 1:
            remarks.append(
                "The reference executor, as AMCT's simulation, rounds the hidden state before the "
                "first step only; the fake-quant model computes what was trained."
            )
        if self.x.offset_d or self.h.offset_d:
            remarks.append(
                f"AMCT's own files have offsets of 0 here; these are {self.x.offset_d} and "
                f"{self.h.offset_d} (a symmetric activation in the recipe gives 0)."
            )
        return " ".join(remarks)


def find_recurrent(
    model: ir.Model, found: QuantizedGraph | None = None
) -> tuple[tuple[QuantizedRecurrent, ...], tuple[Remark, ...]]:
    """Every LSTM and GRU that has a device node, and why the others have none.

    Args:
        model: The QDQ model; it stays as it is.
        found: What ``find_quantized`` says of it, where that is known.
    """
    found = found or find_quantized(model)
    grids = {node: grid for grid in found.activations for node in grid.dequantizes}
    layers, left = [], []
    for node in model.graph:
        if node.op_type in RECURRENT_OPS and not node.domain:
            try:
                layers.append(_recurrent(node, grids))
            except Mismatch as mismatch:
                reason, *remedy = mismatch.args
                left.append(Remark(label(node), f"it has no device node: {reason}", *remedy))
    return tuple(layers), tuple(left)


class ToDeviceNodes(ir.passes.InPlacePass):
    """Replace what ``find_recurrent`` finds by device nodes, which quantize their inputs."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        layers, _ = find_recurrent(model)
        for layer in layers:
            _write_device_node(model.graph, layer)
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(layers))


class RoundRecurrentBiases(ir.passes.InPlacePass):
    """Give what ``find_recurrent`` finds the real values of the device node's integer biases."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        layers, _ = find_recurrent(model)
        for layer in layers:
            if layer.bias is not None:
                rows = layer.bias.size // 2
                scales = (_by_row(s, rows) for s in np.split(layer.product_scale, 2))
                real = layer.bias.astype(np.float32) * np.concatenate(tuple(scales))
                name = f"{layer.name}.bias"
                layer.node.replace_input_with(3, initializer(model.graph, name, real))
        return ir.passes.PassResult(model, modified=bool(layers))


def _recurrent(node: ir.Node, grids: dict[ir.Node, Activation]) -> QuantizedRecurrent:
    """Raises ``Mismatch`` where the node is none that a device has."""
    for name, (wanted, default) in _FIXED.items():
        if name in node.attributes:
            given: Any = node.attributes[name].value
        else:
            given = default
        needless = name == "linear_before_reset" and node.op_type == "LSTM"
        if given != wanted and not needless:
            raise Mismatch(f"its {name} must be {wanted!r}; it is {given!r}")
    inputs = [*node.inputs, *[None] * 8]
    for index, what in ((4, "sequence lengths"), (7, "peepholes")):
        if inputs[index] is not None:
            raise Mismatch(f"it must have no {what}")
    x, h = (
        _grid(inputs[index], grids, what)
        for index, what in ((0, "input"), (5, "initial hidden state"))
    )
    if node.op_type == "LSTM" and inputs[6] is None:
        raise Mismatch("its initial cell state must be given")
    gates = _GATES[node.op_type]
    weight, scale_w = _weight(inputs[1], gates)
    recurrent, scale_r = _weight(inputs[2], gates)
    rows = weight.shape[1]
    if (scale_w.size == gates) != (scale_r.size == gates):
        scale_w, scale_r = (_by_row(s, rows) for s in (scale_w, scale_r))
    for product in (x.scale_d * scale_w, h.scale_d * scale_r):
        if not usable_scale(product):
            raise Mismatch("the products of its scales must be positive normal float32")
    bias = None
    if inputs[3] is not None:
        real = real_constant(inputs[3])
        if real is None:
            raise Mismatch("its bias must be a constant")
        steps = np.concatenate(
            (_by_row(x.scale_d * scale_w, rows), _by_row(h.scale_d * scale_r, rows))
        ).astype(np.float64)
        rounded = np.rint(real.astype(np.float64) / steps)
        if rounded.min() < _INT32.min or rounded.max() > _INT32.max:
            raise Mismatch("its bias, in steps of scale_d * scale_w, must fit int32")
        bias = rounded.astype(np.int32)
    shape = x.source.shape
    first = None if shape is None else shape[0]
    length = first if isinstance(first, int) else None
    return QuantizedRecurrent(
        label(node), node, x, h, weight, recurrent, scale_w, scale_r, bias, length
    )


def _grid(value: ir.Value | None, grids: dict[ir.Node, Activation], what: str) -> Activation:
    producer = None if value is None else value.producer()
    grid = None if producer is None else grids.get(producer)
    if grid is None:
        raise Mismatch(f"its {what} must be quantized, which tells its scale")
    if grid.dst_type != "INT8" or grid.narrowed or grid.real != ir.DataType.FLOAT:
        raise Mismatch(f"its {what} must have all 8 bits, and be float32 before")
    return grid


def _weight(value: ir.Value | None, gates: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers, and a scale per row, or per gate where there is one for all."""
    integers, scale, axis, _ = stored_integers(value)
    if integers.ndim != 3 or integers.shape[0] != 1:
        raise Mismatch(f"its weights must have one direction; got {list(integers.shape)}")
    if scale.size > 1 and axis != 1:
        raise Mismatch(f"its weights' scales must run along axis 1; they run along axis {axis}")
    if integers.min() < _INT8.min or integers.max() > _INT8.max:
        raise Mismatch("its weights' integers must fit int8")
    return integers.astype(np.int8), np.tile(scale, gates) if scale.size == 1 else scale


def _by_row(scale: Array, rows: int) -> Array:
    """One number per row from one per gate or row."""
    return np.repeat(scale, rows // scale.size)


def _write_device_node(graph: ir.Graph, layer: QuantizedRecurrent) -> None:
    node = layer.node
    hidden = layer.recurrent.shape[2]
    attributes = {
        "hidden_size": hidden,
        **({"input_forget": 0} if node.op_type == "LSTM" else {"linear_before_reset": 1}),
        "direction": "forward",
        "clip": -1.0,
        "quant_scale_x": float(np.float32(1) / layer.x.scale_d),
        "quant_offset_x": float(layer.x.offset_d),
        "quant_scale_h": float(np.float32(1) / layer.h.scale_d),
        "quant_offset_h": float(layer.h.offset_d),
        "quant_sqrt_mode_x": 0,
        "quant_sqrt_mode_h": 0,
        # INT8 in CANN's numbering of types.
        "quant_dtype": 2,
    }
    empty = [
        ir.AttrStrings("activations", []),
        ir.AttrFloat32s("activation_alpha", []),
        ir.AttrFloat32s("activation_beta", []),
    ]
    name = layer.name
    param = layer.product_scale.view(np.uint32).astype(np.uint64)
    constants = {
        "weight": layer.weight,
        "recurrent": layer.recurrent,
        "bias": layer.bias,
        "dequant.param": param,
    }
    weight, recurrent, bias, scale = (
        None if array is None else initializer(graph, f"{name}.{key}", array)
        for key, array in constants.items()
    )
    cell = [node.inputs[6]] if node.op_type == "LSTM" else []
    new = ir.Node(
        "",
        layer.op_type,
        [layer.x.source, weight, recurrent, layer.h.source, *cell, bias, None, None, scale],
        [*ir.convenience.convert_attributes(attributes), *empty],
        num_outputs=3 if node.op_type == "LSTM" else 2,
        name=name,
    )
    for number, made in enumerate(new.outputs):
        made.name = f"{name}.output{number}"
        made.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(node, new)
    for old, made in zip(node.outputs, new.outputs, strict=False):
        made.shape = old.shape
        made.name, old.name = old.name or made.name, None
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
