"""The keys of a recipe that is written as a mapping, as types for jsonargparse and type checkers.

Written by hand, because both read the types from the source; a test in ``tests/callback`` compares
the keys with the fields of ``WeightSpec``, ``ActivationSpec`` and ``Recipe``.
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

Granularity = Literal["per_channel", "per_tensor"]
Calibration = Literal["moving_average", "minmax", "percentile", "mse", "entropy", "histogram"]
WeightQuantizerName = Literal["minmax", "arq", "learned", "ulq"]
ActivationQuantizerName = Literal["observed", "learned", "ulq", "weight"]
Initial = Literal["mse", "minmax"]


class WeightKeys(TypedDict, total=False):
    """Keys of ``WeightSpec``; those that are left out keep the preset's values."""

    bits: int
    granularity: Granularity
    quantizer: WeightQuantizerName
    initial: Initial


class ActivationKeys(TypedDict, total=False):
    """Keys of ``ActivationSpec``; those that are left out keep the preset's values."""

    bits: int
    symmetric: bool
    quantizer: ActivationQuantizerName
    calibration: Calibration
    fixed_min: bool | None
    clip: list[float] | None
    calibration_batches: int
    samples: int | None


class LayerKeys(TypedDict, total=False):
    """Keys of one override: the specs that it may change."""

    weight: WeightKeys
    activation: ActivationKeys


class RecipeKeys(TypedDict, total=False):
    """A recipe as a mapping: ``Recipe``'s own keys, and the preset that they change."""

    preset: Literal["int8", "w4a8", "w4a4", "a16w8", "amct"]
    weight: WeightKeys
    activation: ActivationKeys
    joins: bool
    outputs: bool
    include: list[str]
    exclude: list[str]
    overrides: dict[str, LayerKeys | None]
    first_last: int | None
    join_bits: int | None
