"""A sensitivity result as JSON holds it, as types."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

Number = float | Literal["inf", "-inf"]
"""JSON has no infinity: it is a word here."""


class StoredRow(TypedDict):
    """``SensitivityRow``."""

    layer: str
    kind: str
    bits: int
    input_bits: int
    value: Number
    drop: Number


class StoredSize(TypedDict):
    """``LayerSize``."""

    layer: str
    bits: int
    input_bits: int
    weights: int
    multiplications: int


class _Further(TypedDict, total=False):
    sizes: list[StoredSize]
    never_run: list[str]
    fingerprint: str


class StoredSensitivity(_Further):
    """``Sensitivity``."""

    rows: list[StoredRow]
    metric: str
    mode: Literal["only", "all_but"]
    recipe: dict[str, object]
    float_value: Number
    quantized_value: Number
