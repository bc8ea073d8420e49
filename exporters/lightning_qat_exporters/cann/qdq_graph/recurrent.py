"""LSTM and GRU of a QDQ graph that a device has one integer operator for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lightning_qat.export.protocol import Array, CannotExpress
from lightning_qat_exporters.cann.int4_packing import RNN_INPUT_AXIS, can_pack
from lightning_qat_exporters.cann.qdq_graph.names import label
from lightning_qat_exporters.cann.qdq_graph.qparams import usable_scale
from lightning_qat_exporters.cann.qdq_graph.quantized_constants import (
    constant_integers,
    real_constant,
)
from lightning_qat_exporters.cann.qdq_graph.types import IntegerRecurrent, QuantizedActivation

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


def read_recurrent(
    node: ir.Node, activation_of: Mapping[ir.Node, QuantizedActivation]
) -> IntegerRecurrent:
    """Read an LSTM or GRU whose input, initial hidden state and weights are all quantized.

    Args:
        node: The ``LSTM`` or ``GRU``.
        activation_of: The activation of every DequantizeLinear.

    Raises:
        CannotExpress: A device has no operator for this node.
    """
    _check_attributes(node)
    inputs = [*node.inputs, *[None] * 8]
    for index, what in ((4, "sequence lengths"), (7, "peepholes")):
        if inputs[index] is not None:
            raise CannotExpress(f"it must have no {what}")
    x = _activation(inputs[0], activation_of, "input")
    h = _activation(inputs[5], activation_of, "initial hidden state")
    if node.op_type == "LSTM" and inputs[6] is None:
        raise CannotExpress("its initial cell state must be given")
    gates = _GATES[node.op_type]
    weight, scale_w, narrow_w = _weight(inputs[1], gates)
    recurrent, scale_r, narrow_r = _weight(inputs[2], gates)
    rows = weight.shape[1]
    if (scale_w.size == gates) != (scale_r.size == gates):
        scale_w, scale_r = by_row(scale_w, rows), by_row(scale_r, rows)
    products = x.scale_d * scale_w, h.scale_d * scale_r
    if not all(map(usable_scale, products)):
        raise CannotExpress("the products of its scales must be positive normal float32")
    shape = x.source.shape
    steps = None if shape is None else shape[0]
    return IntegerRecurrent(
        name=label(node),
        node=node,
        x=x,
        h=h,
        weight=weight,
        recurrent=recurrent,
        scale_w=scale_w,
        scale_r=scale_r,
        bias=_bias(inputs[3], np.concatenate([by_row(p, rows) for p in products])),
        steps=steps if isinstance(steps, int) else None,
        wts_type="INT4" if narrow_w and narrow_r else "INT8",
    )


def by_row(scale: Array, rows: int) -> Array:
    """One scale per row, from one per gate or row."""
    return np.repeat(scale, rows // scale.size)


def _check_attributes(node: ir.Node) -> None:
    for name, (wanted, default) in _FIXED.items():
        given: Any = node.attributes[name].value if name in node.attributes else default
        of_gru_only = name == "linear_before_reset" and node.op_type == "LSTM"
        if given != wanted and not of_gru_only:
            raise CannotExpress(f"its {name} must be {wanted!r}; it is {given!r}")


def _activation(
    value: ir.Value | None, activation_of: Mapping[ir.Node, QuantizedActivation], what: str
) -> QuantizedActivation:
    producer = None if value is None else value.producer()
    activation = None if producer is None else activation_of.get(producer)
    if activation is None:
        raise CannotExpress(f"its {what} must be quantized, which tells its scale")
    whole = activation.dst_type == "INT8" and not activation.narrowed
    if not whole or activation.real != ir.DataType.FLOAT:
        raise CannotExpress(f"its {what} must have all 8 bits, and be float32 before")
    return activation


def _weight(
    value: ir.Value | None, gates: int
) -> tuple[NDArray[np.int8], NDArray[np.float32], bool]:
    """Integers, a scale per row, or per gate where there is one for all, and whether they pack."""
    integers, scale, axis, dtype = constant_integers(value)
    if integers.ndim != 3 or integers.shape[0] != 1:
        raise CannotExpress(f"its weights must have one direction; got {list(integers.shape)}")
    if scale.size > 1 and axis != 1:
        raise CannotExpress(
            f"its weights' scales must run along axis 1; they run along axis {axis}"
        )
    if integers.min() < _INT8.min or integers.max() > _INT8.max:
        raise CannotExpress("its weights' integers must fit int8")
    packs = dtype == ir.DataType.INT4.numpy() and can_pack(integers.shape[RNN_INPUT_AXIS], 1)
    return integers.astype(np.int8), np.tile(scale, gates) if scale.size == 1 else scale, packs


def _bias(value: ir.Value | None, scale: NDArray[np.float32]) -> NDArray[np.int32] | None:
    if value is None:
        return None
    real = real_constant(value)
    if real is None:
        raise CannotExpress("its bias must be a constant")
    rounded = np.rint(real.astype(np.float64) / scale.astype(np.float64))
    if rounded.min() < _INT32.min or rounded.max() > _INT32.max:
        raise CannotExpress("its bias, in steps of scale_d * scale_w, must fit int32")
    return rounded.astype(np.int32)
