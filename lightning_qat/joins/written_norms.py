"""Norms that are written by hand: ``(x - x.mean()) / (x.var() + eps).sqrt() * weight + bias``.

They are planned as ``layer_norm`` and ``rms_norm`` are: the input is quantized, what is computed
inside is float, and the output is quantized by its readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_qat.function_hooks.forward_cache import Key, key_of
from lightning_qat.joins.calls import CASTS

_STARTS = frozenset("pow square mean sum var std var_mean norm vector_norm mul sub abs".split())
"""Functions by which a statistic of a tensor begins."""
_ROOTS = frozenset("sqrt rsqrt std norm vector_norm".split())
_CASTS = CASTS | {"contiguous"}
_SHAPES = frozenset("reshape expand getitem permute".split())
_INSIDE = frozenset("add div rdiv reciprocal clamp clamp_min neg".split()).union(
    _STARTS, _ROOTS, _CASTS, _SHAPES
)
_AFFINE = _CASTS | frozenset("mul add sub div".split())


class _Part(NamedTuple):
    """A tensor that is computed from one other alone, which a norm may normalize.

    Args:
        source: That other tensor.
        rooted: A square root was taken on the way: a deviation, not a mean.
    """

    source: Key
    rooted: bool


class WrittenNorms:
    """Follows through one forward what is computed from one tensor alone, until it is a norm."""

    def __init__(self) -> None:
        self._parts: dict[Key, _Part] = {}
        self._cast: dict[Key, Key] = {}
        self._normalized: dict[Key, Key] = {}
        self._undo: dict[Key, list[Callable[[], None]]] = {}

    def continues(self, name: str, results: Iterable[Key], data: Sequence[Tensor]) -> bool:
        """Whether a call scales, shifts or casts a normalized tensor: it is a part of the norm.

        Args:
            name: Name of the function.
            results: What it returned.
            data: Those of its tensors that are neither weights nor constants.
        """
        keys = {key_of(x) for x in data}
        if name not in _AFFINE or len(data) != 1 or not keys <= self._normalized.keys():
            return False
        self._normalized.update(dict.fromkeys(results, self._normalized[keys.pop()]))
        return True

    def follow(
        self,
        name: str,
        args: tuple[Any, ...],
        results: Sequence[Tensor],
        data: Sequence[Tensor],
        *,
        alone: bool,
    ) -> bool:
        """Note a call; whether its result is a normalized tensor.

        Args:
            name: Name of the function.
            args: Its arguments by position.
            results: The tensors that it returned.
            data: Those of its tensors that are neither weights nor constants.
            alone: It has no others, but for numbers.
        """
        if name not in _INSIDE or not (data and results):
            return False
        keys = [self._uncast(key_of(x)) for x in data]
        parts = [self._parts.get(key, _Part(key, rooted=False)) for key in keys]
        sources = {part.source for part in parts}
        outs = [key_of(x) for x in results if key_of(x) not in keys]
        if len(sources) != 1 or not outs:
            return False
        source = sources.pop()
        if name in _CASTS and keys == [source]:
            self._cast.update(dict.fromkeys(outs, source))
            return False
        begun = any(key in self._parts for key in keys)
        starts = name in _STARTS and alone and not (name in ("mul", "sub") and len(data) < 2)
        if not begun and not starts:
            return False
        whole = results[0].numel()
        scaled_down = name in ("mul", "div") and len(data) == 2
        small = [p for p, x in zip(parts, data, strict=True) if x.numel() < whole]
        if scaled_down and len(small) == 1 and small[0].rooted:
            self._normalized.update(dict.fromkeys(outs, source))
            return True
        power = args[1] if name == "pow" and len(args) > 1 else None
        rooted = name in _ROOTS or (isinstance(power, float) and abs(power) == 0.5)
        part = _Part(source, rooted or any(part.rooted for part in parts))
        self._parts.update(dict.fromkeys(outs, part))
        return False

    def remember(
        self, results: Iterable[Key], undo: Callable[[], None], operand: Key | None = None
    ) -> None:
        """Keep how to take back what was noted of a call, if a norm has it inside.

        Args:
            results: What the call returned.
            undo: Takes the note back.
            operand: The operand that was planned, if that is what was noted.
        """
        for key in results:
            part = self._parts.get(key)
            source = part.source if part is not None else self._normalized.get(key)
            if source is not None:
                if operand is None or self._uncast(operand) != source:
                    self._undo.setdefault(source, []).append(undo)
                return

    def take_back(self, results: Iterable[Key]) -> None:
        """Take back what was planned inside of a norm whose result is known now."""
        for key in results:
            for undo in self._undo.pop(self._normalized.get(key, key), ()):
                undo()

    def _uncast(self, key: Key) -> Key:
        return self._cast.get(key, key)
