"""Group recorded consumers of tensors into sets that share one quantizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_qat.function_hooks.forward_cache import Key

INPUT = "input"


@dataclass(frozen=True)
class _Operand:
    """Where a tensor is consumed: an operand of a call, a layer's input, an output."""

    module: str
    function: str
    call: int = field(compare=False)  # for names; the place is what tells calls apart
    operand: int
    place: str = ""

    def __str__(self) -> str:
        if self.function == INPUT:
            return self.module or "input"
        where = f"{self.module}.{self.function}" if self.module else self.function
        return f"{where}:{self.call}[{self.operand}]"


@dataclass
class _Event:
    """One consumption: ``tensors`` go into ``where``; ``passes`` come out on the same grid."""

    where: tuple[_Operand, ...]
    tensors: tuple[Key, ...]
    passes: tuple[Key, ...] = ()
    quantizes: bool = True


@dataclass
class _Origin:
    """What is known of a tensor: what made it, and the range it has by definition."""

    name: str
    natural: tuple[float, float] | None = None
    not_negative: bool = False


class _Groups:
    """Disjoint sets of tensors that share a quantizer."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def new(self) -> int:
        self._parent.append(len(self._parent))
        return self._parent[-1]

    def find(self, number: int) -> int:
        while self._parent[number] != number:
            number = self._parent[number]
        return number

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self._parent[max(a, b)] = min(a, b)
