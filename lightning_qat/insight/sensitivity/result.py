"""The result of a sensitivity analysis: a table, a plot, a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_qat.atomic_write import replacing
from lightning_qat.insight.plots import bars
from lightning_qat.insight.sensitivity.stored import Number, StoredSensitivity
from lightning_qat.plain_data.parse_json import parse_json
from lightning_qat.plain_data.shape import as_shape
from lightning_qat.plain_data.text import read_text

if TYPE_CHECKING:
    from lightning_qat.insight.sensitivity.candidates import Candidates

FORMAT = "lightning-qat sensitivity 1"
"""What the files begin with."""

_MOST_BARS = 50


@dataclass(frozen=True)
class SensitivityRow:
    """One measurement.

    Args:
        layer: Dotted name of the layer, or of the call that reads the tensor.
        kind: Float class of the layer, such as ``Conv2d``; of a tensor the function.
        bits: Bits of the layer's weight; of a tensor its own.
        input_bits: Bits of the layer's input; of a tensor its own.
        value: The metric with this layer alone quantized, or with all but this one.
        drop: What the layer costs: in the metric's unit; with ``metric="sqnr"`` the power of the
            noise over that of the signal; with ``"kl"`` in nats.
    """

    layer: str
    kind: str
    bits: int
    input_bits: int
    value: float
    drop: float


@dataclass(frozen=True)
class LayerSize:
    """What a layer weighs, for budgets of size and of BOPs.

    Args:
        layer: Dotted name.
        bits: Of its weight by the recipe.
        input_bits: Of its input.
        weights: The number of its weights.
        multiplications: In one evaluation.
    """

    layer: str
    bits: int
    input_bits: int
    weights: int
    multiplications: int


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing each layer costs. ``print`` shows a table, the most expensive layer first.

    Args:
        rows: The measurements, in the order of the model.
        metric: What was measured, in words.
        mode: ``only``: one layer quantized at a time; ``all_but``: all but one.
        recipe: The recipe, as primitives.
        float_value: The metric of the float model.
        quantized_value: The metric with everything quantized.
        sizes: What the layers weigh.
        never_run: Layers that the evaluation does not run; they are not measured.
        fingerprint: Of the model, the recipe and the data.
    """

    rows: tuple[SensitivityRow, ...]
    metric: str
    mode: str
    recipe: Mapping[str, Any]
    float_value: float
    quantized_value: float
    sizes: tuple[LayerSize, ...] = ()
    never_run: tuple[str, ...] = ()
    fingerprint: str = ""
    candidates: Candidates | None = field(default=None, repr=False, compare=False)
    """Measures further candidates for ``suggest``, in the process that made the result."""

    @property
    def ranking(self) -> tuple[SensitivityRow, ...]:
        """The measurements with the highest cost first."""
        return tuple(sorted(self.rows, key=lambda row: -row.drop))

    @property
    def _cost(self) -> str:
        """What ``drop`` is, in words."""
        return "noise / signal" if "SQNR" in self.metric else "drop"

    def __str__(self) -> str:
        """One line per measurement."""
        how = "one layer quantized at a time" if self.mode == "only" else "all but one quantized"
        head = ("layer", "kind", "bits", self.metric, self._cost)
        table = [head] + [
            (r.layer, r.kind, f"{r.bits}/{r.input_bits}", f"{r.value:.4g}", f"{r.drop:.3g}")
            for r in self.ranking
        ]
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        lines = [
            f"{self.metric}: float {self.float_value:.4g}, all quantized "
            f"{self.quantized_value:.4g}; {how}, bits of weight/input"
        ]
        for line in table:
            text = [cell.ljust(w) for cell, w in zip(line[:2], widths, strict=False)]
            text += [cell.rjust(w) for cell, w in zip(line[2:], widths[2:], strict=True)]
            lines.append("  " + "  ".join(text).rstrip())
        lines += [f"  never run by the evaluation: {name}" for name in self.never_run]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Primitives that JSON holds; ``Sensitivity.from_dict`` reads them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_PLAIN}
        values["rows"] = [_spelt(asdict(row)) for row in self.rows]
        values["sizes"] = [asdict(size) for size in self.sizes]
        values["never_run"] = list(self.never_run)
        plain: dict[str, Any] = {"format": FORMAT, **_spelt(values)}
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """Read what ``to_dict`` gave.

        Raises:
            ValueError: It is something else.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f"A sensitivity result begins with format {FORMAT!r}; this has none.")
        stored = as_shape(values, StoredSensitivity, "a sensitivity result")
        return cls(
            rows=tuple(
                SensitivityRow(
                    row["layer"],
                    row["kind"],
                    row["bits"],
                    row["input_bits"],
                    _number(row["value"], f"value of {row['layer']!r}"),
                    _number(row["drop"], f"drop of {row['layer']!r}"),
                )
                for row in stored["rows"]
            ),
            metric=stored["metric"],
            mode=stored["mode"],
            recipe=stored["recipe"],
            float_value=_number(stored["float_value"], "float_value"),
            quantized_value=_number(stored["quantized_value"], "quantized_value"),
            sizes=tuple(
                LayerSize(
                    size["layer"],
                    size["bits"],
                    size["input_bits"],
                    size["weights"],
                    size["multiplications"],
                )
                for size in stored.get("sizes", ())
            ),
            never_run=tuple(stored.get("never_run", ())),
            fingerprint=stored.get("fingerprint", ""),
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file: the old one or the new one, never half of one."""
        with replacing(Path(path)) as temporary:
            text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file holds something else.
        """
        text = read_text(Path(path))
        try:
            return cls.from_dict(parse_json(text))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no sensitivity result: {error}") from error

    def plot(self, path: str | Path) -> None:
        """Draw the costs of the most expensive layers as bars; the suffix gives the format.

        Raises:
            ImportError: matplotlib is missing.
        """
        shown = self.ranking[:_MOST_BARS]
        several = len({row.bits for row in self.rows}) > 1
        labels = [f"{row.layer} ({row.bits} bits)" if several else row.layer for row in shown]
        left = len(self.rows) - len(shown)
        title = f"{self.metric}, {self._cost} by layer"
        title += f" ({left} more are not shown)" if left else ""
        bars(path, labels, [row.drop for row in shown], title=title, label=self._cost)


_NOT_PLAIN = {"candidates"}
_NUMBERS = ("value", "drop", "float_value", "quantized_value")


def _spelt(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: it is a word here."""
    return {k: str(v) if k in _NUMBERS and math.isinf(v) else v for k, v in values.items()}


def _number(stored: Number, what: str) -> float:
    value = float(stored)
    if math.isnan(value):
        raise ValueError(f"A sensitivity result must hold numbers; the {what} is NaN.")
    return value
