"""The factors of one layer in a record, and what holds of them whatever the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ACTIVATION_BITS: Mapping[str, int] = {"INT4": 4, "INT8": 8, "INT16": 16}
"""Types of an input's integers."""

WEIGHT_BITS: Mapping[str, int] = {"INT4": 4, "INT8": 8}
"""Types of a weight's integers."""

_FLOAT32 = np.finfo(np.float32)
_MOST_TOLD = 20


@dataclass(frozen=True)
class LayerRecord:
    """The factors of one layer; every scale is a float32 value.

    Attributes:
        name: The layer's name, the entry's key.
        scale_d: Scale of the input.
        offset_d: The zero point of the input: the integer of real zero.
        scale_w: Scale of the weight, one or one per output channel, with batch
            norm folded.
        act_type: Type of the input's integers.
        wts_type: Type of the weight's integers.
        scale_h: For LSTM and GRU, as ``scale_d`` for the hidden state.
        offset_h: For LSTM and GRU, as ``offset_d`` for the hidden state.
        scale_r: For LSTM and GRU, as ``scale_w`` for the recurrent weight.
    """

    name: str
    scale_d: float
    offset_d: int
    scale_w: tuple[float, ...]
    act_type: str = "INT8"
    wts_type: str = "INT8"
    scale_h: float | None = None
    offset_h: int | None = None
    scale_r: tuple[float, ...] = ()


def record_problems(record: Iterable[LayerRecord]) -> Iterator[str]:
    """A message for each factor that no quantization has, with its layer and field.

    A scale below the normal float32 numbers is among them: runtimes, and quantization here, take
    such numbers for others, or for zero.

    Example:
        >>> [*record_problems([LayerRecord("fc", 0.5, 300, (0.25,))])]
        ["layer 'fc': offset_d must be in -128..127 for INT8; got 300"]
    """
    seen: set[str] = set()
    for entry in record:
        where = f"layer {entry.name!r}"
        if entry.name in seen:
            yield f"{where} comes twice; a record must name a layer once"
        seen.add(entry.name)
        yield from _type_problems(where, entry)
        yield from _activation(where, "d", entry.scale_d, entry.offset_d, entry.act_type)
        if not entry.scale_w:
            yield f"{where}: scale_w must have one number at least"
        yield from _scales(where, "scale_w", entry.scale_w, 128)
        yield from _scales(where, "scale_r", entry.scale_r, 128)
        hidden = entry.scale_h is not None, entry.offset_h is not None, bool(entry.scale_r)
        if len({*hidden}) > 1:
            yield (
                f"{where}: an LSTM or GRU must have scale_h, offset_h and scale_r, and any other "
                f"layer none of them; got scale_h {entry.scale_h}, offset_h {entry.offset_h} and "
                f"{len(entry.scale_r)} numbers of scale_r"
            )
        if entry.scale_h is not None and entry.offset_h is not None:
            yield from _activation(where, "h", entry.scale_h, entry.offset_h, entry.act_type)


def refuse_problems(what: str, problems: Iterable[str]) -> None:
    """Raise if there are problems, all in one message, but not thousands.

    Raises:
        ValueError: ``what`` and the problems.
    """
    told = [*problems]
    if told:
        more = len(told) - _MOST_TOLD
        last = [f"and {more} more"] if more > 0 else []
        raise ValueError(f"{what} {'; '.join([*told[:_MOST_TOLD], *last])}.")


def _type_problems(where: str, entry: LayerRecord) -> Iterator[str]:
    for field, kind, known in (
        ("act_type", entry.act_type, ACTIVATION_BITS),
        ("wts_type", entry.wts_type, WEIGHT_BITS),
    ):
        if kind not in known:
            yield f"{where}: {field} must be one of {[*known]}; got {kind[:40]!r}"


def _activation(where: str, field: str, scale: float, offset: int, kind: str) -> Iterator[str]:
    bits = ACTIVATION_BITS.get(kind, 8)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    yield from _scales(where, f"scale_{field}", [scale], highest - lowest)
    if not lowest <= offset <= highest:
        yield f"{where}: offset_{field} must be in {lowest}..{highest} for {kind}; got {offset}"


def _scales(where: str, field: str, scales: Sequence[float], steps: int) -> Iterator[str]:
    values = np.asarray(scales, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        stored = values.astype(np.float32).astype(np.float64)
        good = (stored >= _FLOAT32.tiny) & (stored * steps <= _FLOAT32.max)
    for number in np.flatnonzero(~good)[:1]:
        place = f"{field}[{number}]" if len(values) > 1 else field
        yield (
            f"{where}: {place} must be positive and finite, a normal float32 "
            f"({_FLOAT32.tiny:.3g} or more) whose {steps} steps stay below {_FLOAT32.max:.3g}; got "
            f"{float(values[number])!r}"
        )
