"""AscendQuant, AscendAntiQuant and AscendDequant in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from lightning_qat_exporters.cann.executor.domain import DOMAIN, Array, NodeRefused, require

_DTYPES: Mapping[str, np.dtype[np.signedinteger[Any]]] = {
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
}
_ROUND: Mapping[str, Callable[[Array], Array]] = {
    # CANN AscendQuant's round_mode; "Round" goes half to even.
    "Round": np.rint,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Trunc": np.trunc,
}


class AscendQuant(OpRun):
    """``clip(round(x * scale) + offset)``; ``sqrt_mode`` multiplies by ``scale`` twice.

    With ``half``, ``clip(round(x * scale + offset))`` with float16 after every operation, as in
    CANN's public kernels of this operator.
    """

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        *,
        label: str,
        half: int,
        scale: float,
        offset: float = 0.0,
        sqrt_mode: int = 0,
        round_mode: str = "Round",
        dst_type: str = "INT8",
    ) -> tuple[Array]:
        require(label, "dst_type", dst_type, _DTYPES)
        require(label, "round_mode", round_mode, _ROUND)
        if np.isnan(x).any():
            raise NodeRefused(f"{label!r} cannot quantize NaN; its input holds some.")
        # A device's floats become infinite and saturate where they are too large.
        with np.errstate(over="ignore"):
            real = np.dtype(np.float16 if half else np.float32).type
            if not np.isfinite(real(scale)):
                raise NodeRefused(f"The scale of {label!r} must fit float16; got {scale:g}.")
            steps = x.astype(real) * real(scale)
            if sqrt_mode:
                steps = steps * real(scale)
            rounded = _ROUND[round_mode]
            levels = rounded(steps + real(offset)) if half else rounded(steps) + real(offset)
        dtype = _DTYPES[dst_type]
        limits = np.iinfo(dtype)
        # float16 has no 32767.
        return (np.clip(levels.astype(np.float32), limits.min, limits.max).astype(dtype),)


class AscendAntiQuant(OpRun):
    """``(q - offset) * scale``; ``sqrt_mode`` multiplies by ``scale`` twice.

    ``dst_type`` is the type of ``q``, which AMCT writes and nothing depends on.
    """

    op_domain = DOMAIN

    def _run(
        self,
        q: Array,
        *,
        label: str,
        scale: float,
        offset: float = 0.0,
        sqrt_mode: int = 0,
        dtype: int = 0,
        dst_type: str = "INT8",
    ) -> tuple[Array]:
        require(label, "dtype", dtype, _REALS)
        real = (q.astype(np.float32) - np.float32(offset)) * np.float32(scale)
        if sqrt_mode:
            real = real * np.float32(scale)
        return (real.astype(_REALS[dtype]),)


class AscendDequant(OpRun):
    """``float32(acc) * scale``; ``sqrt_mode`` multiplies twice, ``relu_flag`` clamps at 0."""

    op_domain = DOMAIN

    def _run(
        self,
        accumulator: Array,
        param: Array,
        *,
        label: str,
        axis: int,
        sqrt_mode: int = 0,
        relu_flag: int = 0,
        dtype: int = 0,
    ) -> tuple[Array]:
        require(label, "dtype", dtype, _REALS)
        bits = param.astype(np.uint64)
        if (bits >> np.uint64(32)).any():
            raise NodeRefused(
                f"The parameter of {label!r} must be a float32 in the low 32 bits; the high bits "
                "hold an offset or a shift, which this executor does not know."
            )
        scale = bits.astype(np.uint32).view(np.float32)
        if scale.size > 1:
            shape = [1] * accumulator.ndim
            shape[axis] = scale.size
            scale = scale.reshape(shape)
        real = accumulator.astype(np.float32) * scale
        if sqrt_mode:
            real = real * scale
        if relu_flag:
            real = np.maximum(real, np.float32(0))
        return (real.astype(_REALS[dtype]),)


_REALS = {0: np.float32, 1: np.float16}
"""Values of the attribute ``dtype``: ONNX's order, as CANN's operators count."""
