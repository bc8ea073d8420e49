"""The result of a comparison: one row per tensor, in the order of calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_qat.export.compare.tensor_errors import GridUse, TensorErrors

_EXACT = 1e-3
"""A difference of less, in steps, is none."""
_SHOWN = 12
"""So many rows a printed table has; ``to_dict`` has all."""


@dataclass(frozen=True)
class ComparedTensor:
    """One tensor of two models.

    Args:
        name: Its key; ``@1`` is the second call of its quantizer. An output that is not quantized
            goes by its name.
        made_by: The layers that compute it from the quantized tensors before it, else the other
            operators.
        total: The accumulated error: everything before it differs as it does. ``None``: the other
            model does not show the tensor.
        own: The error of ``made_by`` alone, which was given the reference's values. ``None``: not
            known.
        use: How the reference fills its grid; ``None`` where it is not quantized.
        suspicion: Why ``own`` is more than the arithmetic of the target explains; empty: it is not.
    """

    name: str
    made_by: str
    total: TensorErrors | None
    own: TensorErrors | None = None
    use: GridUse | None = None
    suspicion: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two models, tensor by tensor. ``print`` shows the rows that matter.

    Args:
        reference: What is compared with, in words.
        other: What is compared, in words.
        samples: Size of the batch.
        tensors: Activations and outputs, in the order of calls.
        weights: Quantized weights against their float ones, in the order of the model; empty where
            no float weights are known.
        numbers: Numbers of a file that are not the model's, in words; ``None``: it is no file, and
            nothing is wrong with what differs.
    """

    reference: str
    other: str
    samples: int
    tensors: tuple[ComparedTensor, ...]
    weights: tuple[ComparedTensor, ...] = ()
    numbers: tuple[str, ...] | None = None

    @property
    def departure(self) -> ComparedTensor | None:
        """The first tensor whose own error the arithmetic does not explain; ``None``: none is so.

        What makes it is where to look: later tensors differ because it does.
        """
        return next((tensor for tensor in self.tensors if tensor.suspicion), None)

    @property
    def judgement(self) -> str:
        """One sentence on a file: where to look first, or that no layer is wrong by itself."""
        departure = self.departure
        if departure is not None:
            return (
                f"First departure: {departure.name}, made by {departure.made_by}. "
                f"{departure.suspicion}"
            )
        if not any(tensor.total for tensor in self.tensors):
            return "The file shows none of the model's tensors."
        largest = max(tensor.own.max_steps for tensor in self.tensors if tensor.own)
        if largest < _EXACT:
            return "Every layer computes what the model does."
        return (
            "No layer is off by itself by more than rounding explains (at most "
            f"{largest:.3g} steps); differences grow from layer to layer."
        )

    @property
    def worst(self) -> tuple[ComparedTensor, ...]:
        """Tensors that differ, by their own error: the lowest SQNR first."""
        known = [t for t in self.tensors if t.total is not None and t.total.max_steps >= _EXACT]
        return tuple(sorted(known, key=_sqnr))

    def to_dict(self) -> dict[str, Any]:
        """Primitives, for JSON; infinite figures become ``None``."""
        departure = self.departure
        plain: dict[str, Any] = {
            **asdict(self),
            "departure": None if departure is None else departure.name,
        }
        return _finite(plain)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        """What departs first, and the tensors with the largest error of their own."""
        lines = [f"{self.other} compared with {self.reference}: {self.samples} samples"]
        if self.numbers is not None:
            lines += [f"  {text}" for text in (self.judgement, *self.numbers[:_SHOWN])]
        hidden = [tensor.name for tensor in self.tensors if tensor.total is None]
        if hidden:
            named = ", ".join(hidden[:5]) + (" ..." if len(hidden) > 5 else "")
            lines.append(f"  Not shown by the file: {len(hidden)} tensors ({named}).")
        lines += [f"  {line}" for line in _table(_HEADER, [*map(_row, self.worst[:_SHOWN])])]
        weights = sorted(self.weights, key=_sqnr)[:_SHOWN]
        cells = [(weight.name, _decibels(weight.total)) for weight in weights]
        lines += [f"  {line}" for line in _table(("weight", "SQNR dB"), cells)]
        return "\n".join(lines)


_HEADER = (
    *("tensor", "made by", "SQNR dB", "own SQNR", "own max steps", "own differing"),
    *("clipped", "grid unused", "dead channels"),
)

_WORDS = ("tensor", "made by", "weight")
"""Columns that are aligned to the left."""


def _sqnr(tensor: ComparedTensor) -> float:
    errors = tensor.own or tensor.total
    return math.inf if errors is None else errors.sqnr_db


def _row(tensor: ComparedTensor) -> tuple[str, ...]:
    own, use = tensor.own, tensor.use
    return (
        tensor.name,
        tensor.made_by,
        _decibels(tensor.total),
        _decibels(own),
        "" if own is None else f"{own.max_steps:.3g}",
        "" if own is None else f"{own.fraction_differing:.2%}",
        "" if use is None else f"{use.clipped:.2%}",
        "" if use is None else f"{use.unused:.0%}",
        "" if use is None else str(use.dead_channels),
    )


def _decibels(errors: TensorErrors | None) -> str:
    return "" if errors is None else f"{errors.sqnr_db:.1f}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned lines; a column that says nothing is left out. No rows: no lines."""
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            cell.ljust(width) if column[0] in _WORDS else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in (zip(*columns, strict=True) if rows else ())
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
