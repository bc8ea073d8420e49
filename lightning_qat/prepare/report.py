"""The layers that ``prepare`` changed, and those that it left alone, with reasons."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lightning_qat.joins.plan import JoinPlan
from lightning_qat.layers.table import WEIGHT_ONLY
from lightning_qat.recipe.specs import LayerSpec


def _counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"


@dataclass(frozen=True)
class SwappedLayer:
    """A layer that became a QAT layer.

    Args:
        name: Dotted module name; the first one where a module has several.
        kind: Name of the float class.
        spec: Its quantizers.
        aliases: Further names of the same module.
    """

    name: str
    kind: str
    spec: LayerSpec
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class SkippedLayer:
    """A layer with weights that stays as it is, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class PrepareReport:
    """The result of ``prepare``. ``print`` shows a table.

    Args:
        swapped: Layers that became QAT layers.
        skipped: Layers with weights that stay as they are.
        joins: The plan of all quantized tensors; ``None`` when there is none, or not yet.
    """

    swapped: tuple[SwappedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    joins: JoinPlan | None = None

    def after(self, earlier: PrepareReport) -> PrepareReport:
        """One report of two passes over a model, of which this is the later."""
        kept = {layer.name for layer in self.skipped}
        first = tuple(layer for layer in earlier.swapped if layer.name in kept)
        names = {layer.name for layer in first}
        skipped = tuple(layer for layer in self.skipped if layer.name not in names)
        return PrepareReport(first + self.swapped, skipped, self.joins)

    def summary(self) -> str:
        """Counts by kind of layer and by reason, for models of hundreds of layers."""
        kinds = Counter(layer.kind for layer in self.swapped)
        lines = [
            f"{len(self.swapped)} layers quantized ({_counts(kinds)}), {len(self.skipped)} left as "
            "they are"
        ]
        reasons: dict[tuple[str, str], list[str]] = {}
        for skipped in self.skipped:
            reasons.setdefault((skipped.kind, skipped.reason), []).append(skipped.name)
        for (kind, reason), names in reasons.items():
            more = ", ..." if len(names) > 1 else ""
            lines.append(f"  {len(names)} {kind} ({names[0]}{more}): left as they are, {reason}")
        if self.joins is not None:
            lines.append(self.joins.summary())
        return "\n".join(lines)

    def with_plan(self, plan: JoinPlan | None) -> PrepareReport:
        """The report once the plan is made: layers that the forward never runs are float again."""
        if plan is None:
            return self
        gone = [layer for layer in self.swapped if layer.name in plan.unreached]
        reason = "the exported forward never runs it, or never multiplies with its weight"
        return PrepareReport(
            tuple(layer for layer in self.swapped if layer not in gone),
            (*self.skipped, *(SkippedLayer(s.name, s.kind, reason) for s in gone)),
            plan,
        )

    def __str__(self) -> str:
        """One line per layer."""
        names = [s.name for s in self.swapped] + [s.name for s in self.skipped]
        width = max(map(len, names), default=0)
        lines = [f"{len(self.swapped)} layers quantized, {len(self.skipped)} left as they are"]
        for layer in self.swapped:
            weight, activation = layer.spec.weight, layer.spec.activation
            aliases = f" (also {', '.join(layer.aliases)})" if layer.aliases else ""
            kind = "symmetric" if activation.symmetric else "affine"
            reads = f", input {activation.bits} bits {kind}"
            lines.append(
                f"  {layer.name:{width}}  {layer.kind}: weight {weight.bits} bits "
                f"{weight.granularity} {weight.quantizer}"
                f"{'' if layer.kind in WEIGHT_ONLY else reads}{aliases}"
            )
        for skipped in self.skipped:
            lines.append(
                f"  {skipped.name:{width}}  {skipped.kind}: left as it is, {skipped.reason}"
            )
        if self.joins is not None:
            lines.append(str(self.joins))
        return "\n".join(lines)
