"""The rules of AMCT's configurations: which words, types and numbers it takes, and together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from lightning_qat.recipe.checks import (
    choice_problem,
    flag_problem,
    is_int,
    is_number,
    key_problems,
    shown,
)

PAIRS = (("INT8", "INT8"), ("INT16", "INT8"), ("INT8", "INT4"))
"""Types of activations and weights that AMCT allows together."""

WEIGHT_ALGORITHMS = {"arq_retrain": "arq", "ulq_retrain": "ulq"}
"""AMCT's name of a weight algorithm to ours."""

DATA_ALGORITHM = "ulq_quantize"

BITS = {"INT4": 4, "INT8": 8, "INT16": 16}
_DATA_TYPES = ("INT8", "INT16")
_WEIGHT_TYPES = ("INT8", "INT4")
_CLIPS = ("clip_max", "clip_min")


class AmctRules:
    """Reads values of AMCT's configurations, and collects what is wrong with them.

    Every method returns a value that can be used even if the given one breaks a rule, so that one
    pass finds all problems. ``where`` names the value in a message.

    Attributes:
        problems: A message for each broken rule.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    def broken(self, where: str, rule: str, value: object) -> None:
        """Note a broken rule."""
        self.problems.append(f"{where} {rule}; got {shown(value)}")

    def check(self, what: str) -> None:
        """Raise ``ValueError`` with all problems, if there are any."""
        if self.problems:
            raise ValueError(f"{what} breaks rules: " + "; ".join(self.problems) + ".")

    def keys(self, where: str, values: object, known: Collection[str]) -> bool:
        """``True`` if ``values`` is a mapping; each key that is not known is a problem."""
        self.problems += key_problems(where, values, known)
        return isinstance(values, Mapping)

    def batches(self, where: str, value: object) -> int:
        """A number of batches; 1 if none is given."""
        if value is None:
            return 1
        if not is_int(value) or value < 1:
            self.broken(where, "must be a whole number of 1 or more", value)
            return 1
        return value

    def flag(self, where: str, value: object, *, default: bool | None) -> bool | None:
        """A flag, or its default if it is not given."""
        problem = None if value is None else flag_problem(where, value)
        return value if self._holds(problem) and isinstance(value, bool) else default

    def choice(self, where: str, value: object, known: Collection[str], default: str) -> str:
        """One of the known words, or the default if none is given."""
        problem = None if value is None else choice_problem(where, value, known)
        return default if value is None or not self._holds(problem) else str(value)

    def _holds(self, problem: str | None) -> bool:
        self.problems += [] if problem is None else [problem]
        return problem is None

    def data(self, where: str, config: object, further: Collection[str]) -> dict[str, Any]:
        """The activation's part of a recipe, complete but for ``calibration_batches``."""
        if not self.keys(where, config, (*further, "fixed_min", *_CLIPS)):
            config = {}
        assert isinstance(config, Mapping)
        self.choice(f"{where}.algo", config.get("algo"), (DATA_ALGORITHM,), DATA_ALGORITHM)
        bits = BITS[
            self.choice(f"{where}.dst_type", config.get("dst_type"), _DATA_TYPES, _DATA_TYPES[0])
        ]
        fixed = self.flag(f"{where}.fixed_min", config.get("fixed_min"), default=None)
        if fixed and bits == 16:
            self.problems.append(
                f"{where}.fixed_min pins the lower end at 0, which the symmetric grid of INT16 "
                "cannot have; leave it out"
            )
            fixed = None
        return {
            "quantizer": "ulq",
            "bits": bits,
            "symmetric": bits == 16,
            "fixed_min": fixed,
            "clip": self.clip(where, config),
        }

    def clip(self, where: str, config: Mapping[str, Any]) -> list[float] | None:
        """The given range as ``[low, high]``, if any."""
        given = {name: config[name] for name in _CLIPS if config.get(name) is not None}
        if not given:
            return None
        rules = {"clip_max": "must be above 0 and finite", "clip_min": "must be below 0 and finite"}
        for name, value in given.items():
            right = is_number(value) and abs(value) < math.inf and value != 0
            if not right or (value > 0) != (name == "clip_max"):
                self.broken(f"{where}.{name}", rules[name], value)
                return None
        if len(given) < len(_CLIPS):
            self.problems.append(
                f"{where} must give clip_max and clip_min together; it gives {next(iter(given))} "
                "alone"
            )
            return None
        return [given["clip_min"], given["clip_max"]]

    def weight(self, where: str, config: object, algorithm: str, kind: str = "") -> dict[str, Any]:
        """The weight's part of a recipe; without ``granularity`` where nothing is said of it."""
        if not self.keys(where, config, (algorithm, "dst_type", "channel_wise")):
            config = {}
        assert isinstance(config, Mapping)
        name = self.choice(
            f"{where}.{algorithm}", config.get(algorithm), WEIGHT_ALGORITHMS, "arq_retrain"
        )
        bits = BITS[
            self.choice(
                f"{where}.dst_type", config.get("dst_type"), _WEIGHT_TYPES, _WEIGHT_TYPES[0]
            )
        ]
        values: dict[str, Any] = {"quantizer": WEIGHT_ALGORITHMS[name], "bits": bits}
        per_channel = self.flag(f"{where}.channel_wise", config.get("channel_wise"), default=None)
        if per_channel and kind == "Linear":
            self.problems.append(
                f"{where}.channel_wise must be false for Linear, whose weight has one scale on "
                "Ascend; got true"
            )
        elif per_channel is not None:
            values["granularity"] = "per_channel" if per_channel else "per_tensor"
        return values

    def pair(self, where: str, activation: Mapping[str, Any], weight: Mapping[str, Any]) -> None:
        """Check that AMCT allows the bits of an activation and a weight together."""
        if bits_of(activation, weight) not in bit_pairs():
            self.problems.append(
                f"{where}: activation and weight must be a pair of {bit_pairs()} bits; got "
                f"{bits_of(activation, weight)}"
            )


def bits_of(activation: Mapping[str, Any], weight: Mapping[str, Any]) -> str:
    """The bits of an activation and a weight, as ``8/4``."""
    return f"{activation['bits']}/{weight['bits']}"


def bit_pairs() -> list[str]:
    """The pairs of bits that AMCT allows, in the form of ``bits_of``."""
    return [f"{BITS[activation]}/{BITS[weight]}" for activation, weight in PAIRS]
