"""What the page shows, as plain data: collected first, drawn afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Histogram:
    """Values over equal bins, and the grid that they are rounded to.

    Args:
        low: Where the first bin begins.
        high: Where the last bin ends.
        counts: Values per bin.
        grid_low: The smallest value on the grid.
        grid_high: The largest.
        step: The distance between two values of the grid.
        zero: Where real zero lies.
        unit: What the axis counts: ``value``, or ``integer`` for a weight with many scales.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    grid_low: float
    grid_high: float
    step: float
    zero: float
    unit: Literal["value", "integer"]


@dataclass(frozen=True)
class TensorRow:
    """One quantized activation.

    Args:
        name: Its key; ``@1`` is the second call of its quantizer.
        made_by: Layers, else operators, that compute it.
        bits: Of its grid.
        symmetric: Its zero point lies in the middle of the grid.
        scale: Its scale.
        zero_point: Its zero point.
        low: The smallest real value of its grid.
        high: The largest.
        clipped: Share of values outside; ``None``: not measured.
        unused: Share of the grid below the smallest and above the largest value.
        sqnr_db: Signal over the noise of rounding and clipping; infinite: no noise.
        histogram: Its values before rounding.
    """

    name: str
    made_by: str
    bits: int
    symmetric: bool
    scale: float
    zero_point: int
    low: float
    high: float
    clipped: float | None = None
    unused: float | None = None
    sqnr_db: float | None = None
    histogram: Histogram | None = None


@dataclass(frozen=True)
class LayerRow:
    """One call of a layer with quantized input and weight.

    Args:
        name: Dotted path.
        kind: Class of the float layer, or the operator.
        bits: Of its weight.
        channels: Scales of its weight; 0: one for the whole tensor.
        scale_low: The smallest of them.
        scale_high: The largest.
        shape: Of the weight.
        weights: Their number; 0 where an earlier row has counted them.
        sqnr_db: Of the weight against the float one; ``None``: the float one is not known.
        multiplications: Of one sample.
        input: Its input.
        histogram: The integers of its weight.
    """

    name: str
    kind: str
    bits: int
    channels: int
    scale_low: float
    scale_high: float
    shape: tuple[int, ...]
    weights: int
    sqnr_db: float | None
    multiplications: int
    input: TensorRow
    histogram: Histogram

    @property
    def float_bytes(self) -> int:
        """Size of the weights in float32."""
        return 4 * self.weights

    @property
    def bytes(self) -> int:
        """Size of the weights as integers."""
        return (self.weights * self.bits + 7) // 8


@dataclass(frozen=True)
class FloatPart:
    """A layer or a call that computes in float.

    Args:
        name: The layer, or the module and the function.
        kind: Class or function.
        reason: Why.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Product:
    """What multiplies.

    Args:
        name: The layer, or the module and the function.
        multiplications: Of one sample.
        bits: Of both factors; 32 is float.
    """

    name: str
    multiplications: int
    bits: tuple[int, int]

    @property
    def bit_operations(self) -> int:
        """Multiplications times the bits of both factors."""
        return self.multiplications * self.bits[0] * self.bits[1]

    @property
    def float_bit_operations(self) -> int:
        """The same in float32."""
        return self.multiplications * 32 * 32


@dataclass(frozen=True)
class Box:
    """One box of the plan: a call, and those behind it that nothing else reads.

    Args:
        label: Its layers, else the module and operator of its first call.
        detail: Its operators.
        kind: How it computes.
        layer: Number of its row among the layers; ``None``: it is none.
    """

    label: str
    detail: str
    kind: Literal["input", "integer", "float", "other", "output"]
    layer: int | None = None


@dataclass(frozen=True)
class Arrow:
    """One tensor between two boxes.

    Args:
        start: Number of the box that makes it.
        end: Number of the box that reads it.
        tensor: Name of its quantization; empty: it is float.
        bits: Of its grid; 0: it is float.
    """

    start: int
    end: int
    tensor: str = ""
    bits: int = 0


@dataclass(frozen=True)
class Plan:
    """The quantized tensors of a model and what lies between them, in the order of the graph."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


@dataclass(frozen=True)
class FileSize:
    """One file of a target.

    Args:
        role: What it is.
        path: Relative to the folder.
        bytes: Its size; ``None``: it is missing.
        state: ``as exported``, ``missing`` or ``changed since the export``.
    """

    role: str
    path: str
    bytes: int | None
    state: str = "as exported"


@dataclass(frozen=True)
class ErrorRow:
    """How far one tensor of a file is from the model.

    Args:
        name: The tensor.
        made_by: What computes it.
        own_sqnr_db: Of its layers alone; infinite: they compute the same.
        own_max_steps: The largest difference of its layers alone, in steps.
        sqnr_db: With everything before it.
        max_steps: The largest difference with everything before it.
        suspicion: Why it is more than rounding explains; empty: it is not.
    """

    name: str
    made_by: str
    own_sqnr_db: float
    own_max_steps: float
    sqnr_db: float
    max_steps: float
    suspicion: str = ""


@dataclass(frozen=True)
class TargetPart:
    """One target.

    Args:
        name: Name of its exporter.
        files: Its files, and those that hold data for them.
        agreement: As the manifest has it; ``None``: not known.
        judgement: What the comparison layer by layer says, or why there is none.
        worst: The tensors with the largest errors of their own, the worst first.
        notes: What a reader of the files should know.
        differences: What is planned on integers and not in the files.
        error: Why the export failed; empty: it did not.
    """

    name: str
    files: tuple[FileSize, ...] = ()
    agreement: Mapping[str, Any] | None = None
    judgement: str = ""
    worst: tuple[ErrorRow, ...] = ()
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    error: str = ""

    @property
    def max_steps(self) -> float | None:
        """The largest difference of any output in the most literal runtime."""
        runtimes = (self.agreement or {}).get("runtimes") or ()
        return (
            max((o["max_steps"] for o in runtimes[0]["outputs"]), default=0.0) if runtimes else None
        )


@dataclass(frozen=True)
class Training:
    """What the run has said, as the manifest holds it.

    Args:
        loss: Step and training loss.
        phases: Step and name of each phase that began there.
    """

    loss: tuple[tuple[int, float], ...] = ()
    phases: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    Args:
        name: The model.
        samples: How many samples the activations' figures are of.
        layers: Quantized layers, in the order of calls.
        tensors: Quantized activations, in the order of calls.
        left_float: What computes in float.
        products: Everything that multiplies matrices.
        float_bytes: Size of all parameters in float32.
        bytes: Their size with integer weights.
        plan: The plan of tensors.
        targets: The targets.
        training: The run.
        facts: The environment, and what was exported.
        recipe: The recipe as primitives.
        cautions: What keeps the page from saying more.
    """

    name: str
    samples: int
    layers: tuple[LayerRow, ...]
    tensors: tuple[TensorRow, ...]
    left_float: tuple[FloatPart, ...]
    products: tuple[Product, ...]
    float_bytes: int
    bytes: int
    plan: Plan
    targets: tuple[TargetPart, ...]
    training: Training
    facts: Mapping[str, str]
    recipe: Mapping[str, Any]
    cautions: tuple[str, ...] = ()

    @property
    def bit_operations(self) -> int:
        """Of one sample."""
        return sum(product.bit_operations for product in self.products)

    @property
    def float_bit_operations(self) -> int:
        """Of one sample, in float32."""
        return sum(product.float_bit_operations for product in self.products)
