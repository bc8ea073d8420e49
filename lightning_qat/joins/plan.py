"""The plan: which quantizer serves which tensors of a model, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_qat.recipe.specs import ActivationSpec, WeightSpec

_SHOWN = 10
"""How many of the calls that stay float a summary names."""


@dataclass(frozen=True)
class PlannedWeight:
    """The quantizer of a weight that no layer has.

    Args:
        spec: Its spec.
        axis: The output channels' axis.
        groups: Of a transposed convolution.
    """

    spec: WeightSpec
    axis: int = 0
    groups: int = 1


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor (or several tied ones) with one quantizer.

    Args:
        quantizer: Dotted path of the quantizer.
        spec: Its spec.
        producers: What makes the tensors: a module path and a function, or ``input``.
        consumers: Where they are quantized: layers, joins (``block.add:0[1]``) and outputs.
        weight: The quantizer of a weight; ``spec`` says no more than its bits then.
    """

    quantizer: str
    spec: ActivationSpec
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    weight: PlannedWeight | None = None


@dataclass(frozen=True)
class JoinPlan:
    """Every quantized tensor of a model. ``print`` shows a table.

    Args:
        tensors: In the order of the forward.
        sites: Module path to call (``add@forward[+#0]:0``, the first sum in its forward) to operand
            number to quantizer path; calls that stay float have no operands.
        links: Layer path to the path of the quantizer that it shares.
        left_float: Calls that stay float, and why.
        unreached: Layers that the forward never runs; they stay float.
        code: What the functions that make the calls looked like; see ``joins/code.py``.
    """

    tensors: tuple[PlannedTensor, ...]
    sites: Mapping[str, Mapping[str, Mapping[str, str]]]
    links: Mapping[str, str]
    left_float: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    code: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Primitives, for checkpoints."""
        return {
            "tensors": [_primitives(tensor) for tensor in self.tensors],
            "sites": {m: {c: dict(o) for c, o in s.items()} for m, s in self.sites.items()},
            "links": dict(self.links),
            "left_float": list(self.left_float),
            "unreached": list(self.unreached),
            "code": {m: {f: dict(c) for f, c in fs.items()} for m, fs in self.code.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> JoinPlan:
        """Read what ``to_dict`` gave."""
        tensors = tuple(
            PlannedTensor(
                t["quantizer"],
                ActivationSpec(**t["spec"]),
                tuple(t["producers"]),
                tuple(t["consumers"]),
                _weight(t.get("weight")),
            )
            for t in values["tensors"]
        )
        return cls(
            tensors,
            values["sites"],
            values["links"],
            tuple(values["left_float"]),
            # Earlier versions have neither.
            tuple(values.get("unreached", ())),
            values.get("code", {}),
        )

    def summary(self) -> str:
        """Counts, and the first calls that stay float."""
        shown = [f"  left float: {call}" for call in self.left_float[:_SHOWN]]
        if len(self.left_float) > _SHOWN:
            shown.append(f"  left float: {len(self.left_float) - _SHOWN} more")
        if self.unreached:
            count = len(self.unreached)
            shown.append(f"  left float: {count} layers that forward never runs")
        return "\n".join([self._counts, *shown])

    @property
    def _counts(self) -> str:
        return f"{len(self.tensors)} tensors quantized, {len(self.left_float)} calls left float"

    def __str__(self) -> str:
        """One line per quantized tensor."""
        lines = [self._counts]
        for tensor in self.tensors:
            lines.append(
                f"  {', '.join(tensor.producers) or 'input'} -> {tensor.quantizer} "
                f"({_spec(tensor.spec)}) -> {', '.join(tensor.consumers)}"
            )
        lines += [f"  left float: {call}" for call in self.left_float]
        lines += [f"  left float: {path}: forward never runs it" for path in self.unreached]
        return "\n".join(lines)

    def mermaid(self) -> str:
        """The plan as a Mermaid flow chart: producers, quantizers, consumers."""
        lines = ["flowchart TD"]
        for number, tensor in enumerate(self.tensors):
            lines.append(f'  q{number}(["{tensor.quantizer}<br/>{_spec(tensor.spec)}"])')
            lines += [f"  {_node(p)} --> q{number}" for p in tensor.producers or ("input",)]
            lines += [f"  q{number} --> {_node(c)}" for c in tensor.consumers]
        return "\n".join(lines) + "\n"


def _primitives(tensor: PlannedTensor) -> dict[str, Any]:
    values = asdict(tensor)
    if tensor.weight is None:
        del values["weight"]
    return values


def _weight(values: Mapping[str, Any] | None) -> PlannedWeight | None:
    if values is None:
        return None
    return PlannedWeight(WeightSpec(**values["spec"]), values["axis"], values["groups"])


def _spec(spec: ActivationSpec) -> str:
    text = f"{spec.bits} bits"
    if spec.quantizer == "weight":
        return f"{text}, weight"
    if spec.clip is not None:
        return f"{text}, {spec.clip[0]:g} .. {spec.clip[1]:g}"
    return f"{text}, from 0" if spec.fixed_min else text


def _node(name: str) -> str:
    letters = "".join(c if c.isalnum() else "_" for c in name)
    return f'n_{letters}["{name}"]'
