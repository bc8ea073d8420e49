"""What the device nodes for LSTM and GRU compute, in NumPy.

As AMCT's simulation computes them: the input and the initial hidden state are quantized, and the
products of the first step are exact on integers; later steps read the hidden state as it is.
Kernels require a sequence length of 1, so there is nothing else to go by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_qat_exporters.cann.executor.domain import NodeRefused
from lightning_qat_exporters.cann.int4_packing import RNN_INPUT_AXIS, unpacked

Array = NDArray[Any]

# The attributes of both, with the one value that is defined here.
_FIXED: Mapping[str, Any] = {
    "direction": "forward",
    "clip": -1.0,
    "quant_sqrt_mode_x": 0,
    "quant_sqrt_mode_h": 0,
    "quant_dtype": 2,
    "input_forget": 0,
    "linear_before_reset": 1,
}


def lstm(
    x: Array,
    weight: Array,
    recurrent: Array,
    h: Array,
    c: Array,
    bias: Array | None,
    param: Array,
    **attributes: Any,
) -> tuple[Array, Array, Array]:
    """Outputs ``[time, 1, batch, hidden]``, last hidden state and last cell state.

    Args:
        x: ``[time, batch, features]``, float32.
        weight: int8 ``[1, 4 * hidden, features]``; gates in ONNX's order i, o, f, c. Two values of
            4 bits may share a byte along the last axis.
        recurrent: int8 ``[1, 4 * hidden, hidden]``, alike.
        h: Initial hidden state ``[1, batch, hidden]``.
        c: Initial cell state, alike.
        bias: int32 ``[1, 8 * hidden]``, that of the input first; or None.
        param: uint64 of 8 or ``8 * hidden``, with the bits of ``scale_d * scale_w`` and of
            ``scale_h * scale_r``.
        attributes: The node's attributes.

    Raises:
        ValueError: An attribute has a value that is not defined here.
    """
    sizes = x.shape[-1], h.shape[-1]
    products = _Products(weight, recurrent, bias, param, sizes, attributes)
    state, cell, outputs = products.initial(h[0]), c[0], []
    for number, step in enumerate(x):
        gates = products.of_input(step) + products.of_state(state, exact=number == 0)
        i, o, f, g = np.split(gates, 4, -1)
        cell = _sigmoid(f) * cell + _sigmoid(i) * np.tanh(g)
        state = _sigmoid(o) * np.tanh(cell)
        outputs.append(state)
    return np.stack(outputs)[:, None], state[None], cell[None]


def gru(
    x: Array,
    weight: Array,
    recurrent: Array,
    h: Array,
    bias: Array | None,
    param: Array,
    **attributes: Any,
) -> tuple[Array, Array]:
    """Outputs ``[time, 1, batch, hidden]`` and the last hidden state.

    Arguments and errors as ``lstm`` with 3 gates for 4, in ONNX's order z, r, h.
    """
    sizes = x.shape[-1], h.shape[-1]
    products = _Products(weight, recurrent, bias, param, sizes, attributes)
    state, outputs = products.initial(h[0]), []
    for number, step in enumerate(x):
        from_x = np.split(products.of_input(step), 3, -1)
        from_h = np.split(products.of_state(state, exact=number == 0), 3, -1)
        z, r = (_sigmoid(a + b) for a, b in zip(from_x[:2], from_h[:2], strict=True))
        new = np.tanh(from_x[2] + r * from_h[2])
        state = (np.float32(1) - z) * new + z * state
        outputs.append(state)
    return np.stack(outputs)[:, None], state[None]


class _Products:
    """The matrix products of a node: integers, and the scales that make them real."""

    def __init__(
        self,
        weight: Array,
        recurrent: Array,
        bias: Array | None,
        param: Array,
        sizes: tuple[int, int],
        attributes: Mapping[str, Any],
    ) -> None:
        label = attributes["label"]
        for name, value in _FIXED.items():
            if attributes.get(name, value) != value:
                raise NodeRefused(f"{name} of {label!r} must be {value}; got {attributes[name]}.")
        rows, (inputs, hidden) = weight.shape[1], sizes
        scales = param.astype(np.uint64).astype(np.uint32).view(np.float32)
        parts = np.split(scales, 2)
        self._x_scale, self._h_scale = (np.repeat(s, rows // s.size) for s in parts)
        whole = np.zeros(2 * rows) if bias is None else bias.reshape(-1).astype(np.float64)
        self._x_bias, self._h_bias = np.split(whole, 2)
        self._weight, self._recurrent = (
            unpacked(w, RNN_INPUT_AXIS, n)[0].astype(np.float64).T
            for w, n in ((weight, inputs), (recurrent, hidden))
        )
        self._x, self._h = (
            (
                np.float32(attributes[f"quant_scale_{n}"]),
                np.float32(attributes[f"quant_offset_{n}"]),
            )
            for n in "xh"
        )

    def initial(self, h: Array) -> Array:
        """The real value of the integers that the first step reads."""
        return (_levels(h, *self._h) * (np.float32(1) / self._h[0])).astype(np.float32)

    def of_input(self, x: Array) -> Array:
        product = _levels(x, *self._x) @ self._weight + self._x_bias
        return np.asarray(product.astype(np.float32) * self._x_scale)

    def of_state(self, h: Array, *, exact: bool) -> Array:
        steps = _levels(h, *self._h) if exact else h * self._h[0]
        product = steps.astype(np.float64) @ self._recurrent + self._h_bias
        return np.asarray(product.astype(np.float32) * self._h_scale)


def _levels(x: Array, scale: np.float32, offset: np.float32) -> Array:
    """Integers around zero."""
    levels = np.rint(x.astype(np.float32) * scale) + offset
    return np.asarray(np.clip(levels, -128, 127) - offset)


def _sigmoid(x: Array) -> Array:
    # By tanh, which cannot overflow.
    return np.asarray(np.float32(0.5) * (np.tanh(np.float32(0.5) * x) + np.float32(1)))
