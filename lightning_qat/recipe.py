"""What is asked: which layers get which quantizers. Frozen values that YAML can spell."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from lightning_qat.amct_config import AMCT_FLOAT, cfg_recipe, is_json_config, json_recipe
from lightning_qat.patterns import contradictions, indexed, is_type, prefixes
from lightning_qat.patterns import selects as selects
from lightning_qat.recipe_keys import (
    ActivationQuantizerName,
    Calibration,
    Granularity,
    Initial,
    LayerKeys,
    WeightQuantizerName,
)
from lightning_qat.spelling import closest as closest

_Spec = TypeVar("_Spec", bound="WeightSpec | ActivationSpec | Recipe")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _clip(clip: Any) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in clip)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high and low < high):
        raise ValueError(
            "ActivationSpec.clip must be (low, high) with low <= 0 <= high and low < high, both "
            f"finite, so that real zero is on the grid; got {clip!r}."
        )
    return low, high


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_choices(spec: WeightSpec | ActivationSpec) -> None:
    kind: Any = type(spec)
    for name, hint in _hints(kind).items():
        choices, value = get_args(hint), getattr(spec, name)
        if hint is bool and not isinstance(value, bool):
            raise ValueError(f"{type(spec).__name__}.{name} must be true or false; got {value!r}.")
        if choices and all(isinstance(c, str) for c in choices) and value not in choices:
            raise ValueError(
                f"{type(spec).__name__}.{name} must be one of {list(choices)}; got {value!r}."
            )


@dataclass(frozen=True)
class WeightSpec:
    """How weights are quantized: symmetric, zero point 0.

    Args:
        bits: 2 to 8. Eight bits use -127..127, fewer bits the full range (4 bits: -8..7).
        granularity: One scale per output channel, or one per tensor.
        quantizer: ``minmax`` takes the scale from the largest absolute weight of every forward;
            ``arq`` is the same by AMCT's rule (-128..127, the farther side touches its end);
            ``learned`` trains the scales with the network (LSQ); ``ulq`` does on AMCT's grid.
        initial: Where learned scales start: ``mse``, the least squared error, or ``minmax``.

    Raises:
        ValueError: A value is outside what is listed.
    """

    bits: int = 8
    granularity: Granularity = "per_channel"
    quantizer: WeightQuantizerName = "minmax"
    initial: Initial = "mse"

    def __post_init__(self) -> None:
        _check_choices(self)
        if not _is_int(self.bits) or not 2 <= self.bits <= 8:
            raise ValueError(f"WeightSpec.bits must be an int from 2 to 8; got {self.bits!r}.")


@dataclass(frozen=True)
class ActivationSpec:
    """How activations are quantized, per tensor.

    Args:
        bits: 2 to 8, or 16.
        symmetric: Zero point 0 and the same reach on both sides; affine otherwise. 16 bits must be
            symmetric.
        quantizer: ``observed``: the range follows the data by ``calibration`` until it is frozen.
            ``learned``: the step, and the lower end of an affine range, are trained with the
            network (LSQ, LSQ+), from where calibration leaves them. ``ulq``: both ends are trained,
            with AMCT's gradients, which are not normalised.
        calibration: ``moving_average`` of each batch's minimum and maximum (a plain mean over the
            first 100 batches, then weight 0.01 for the newest), or the ``minmax`` over all batches;
            or the moving average of each batch's ``percentile`` (99.99 %), of its range with the
            least squared error (``mse``) or with most of its information (``entropy``); or
            ``histogram``, the range with the least squared error over all batches together.
        fixed_min: ``True`` pins the lower end at 0, for inputs that are never negative; otherwise
            the data decide.
        clip: A given range ``(low, high)``, used from the start and never observed; learned
            quantizers start there.
        calibration_batches: How many batches give a learned quantizer the range it starts from,
            where no ``Schedule`` asks for more; from the last of them on it quantizes.
        samples: How many values of a tensor calibration looks at, 64 or more. ``None``: all of them
            for ``moving_average`` and ``minmax``, 32,768 evenly spaced ones for the others. With
            fewer than all, the first two take evenly spaced runs of 64 neighbours: values that are
            farther out than those may be clipped, and NaN or infinity may go unseen.

    Raises:
        ValueError: A value is outside what is listed, or two of them exclude each other.
    """

    bits: int = 8
    symmetric: bool = False
    quantizer: ActivationQuantizerName = "observed"
    calibration: Calibration = "moving_average"
    fixed_min: bool | None = None
    clip: tuple[float, float] | None = None
    calibration_batches: int = 1
    samples: int | None = None

    def __post_init__(self) -> None:
        _check_choices(self)
        if not _is_int(self.bits) or (self.bits != 16 and not 2 <= self.bits <= 8):
            raise ValueError(
                f"ActivationSpec.bits must be an int from 2 to 8, or 16; got {self.bits!r}."
            )
        if self.bits == 16 and not self.symmetric:
            raise ValueError(
                "ActivationSpec: 16-bit activations are symmetric on every target; set "
                "symmetric=True."
            )
        if self.fixed_min and self.symmetric:
            raise ValueError(
                "ActivationSpec: fixed_min pins the lower end at 0, which a symmetric range "
                "cannot have; drop one of the two."
            )
        if self.fixed_min is not None and not isinstance(self.fixed_min, bool):
            raise ValueError(
                f"ActivationSpec.fixed_min must be true, false or null; got {self.fixed_min!r}."
            )
        if not _is_int(self.calibration_batches) or self.calibration_batches < 1:
            raise ValueError(
                "ActivationSpec.calibration_batches must be an int of 1 or more; got "
                f"{self.calibration_batches!r}."
            )
        if self.samples is not None and not (_is_int(self.samples) and self.samples >= 64):
            raise ValueError(
                "ActivationSpec.samples must be an int of 64 or more, or null for what the "
                f"calibration takes by itself; got {self.samples!r}."
            )
        if self.clip is not None:
            object.__setattr__(self, "clip", _clip(self.clip))


@dataclass(frozen=True)
class LayerSpec:
    """The two specs of one layer."""

    weight: WeightSpec
    activation: ActivationSpec


@dataclass(frozen=True)
class Recipe:
    """Which layers are quantized, and how.

    A *pattern* is a glob (``*``, ``?``, ``[...]``) over dotted module names: it selects the layers
    it matches and every layer below a module it matches, so ``encoder`` selects ``encoder.0.conv``.
    ``type:Linear`` selects every layer of that float class.

    Args:
        weight: For every layer not overridden.
        activation: For every layer's input not overridden.
        joins: Quantize the inputs of functional joins (add, cat, mean, softmax and friends) as
            well, so that an integer target can compute everything between two layers.
        outputs: Quantize the model's outputs.
        include: Patterns; when given, only what they select is quantized.
        exclude: Patterns of layers that stay float.
        overrides: Pattern to ``{"weight": {...}, "activation": {...}}`` (only the keys that
            differ), or ``None`` to keep the layer float. A name wins over a type; of two names, and
            of two types, the later wins and must be the narrower one (see ``check_patterns``).
        first_last: How many bits the weight and the input of the model's first and last layer, and
            the model's outputs, have at least: they cost little and their errors weigh most. What
            ``overrides`` says of a name wins. First and last are by a run with the example inputs,
            else by registration. ``None``: they are layers like all others.

    Raises:
        ValueError: Unknown keys (with the closest known ones) or values out of range.

    Example:
        >>> recipe = Recipe(overrides={"head": {"weight": {"bits": 4}}, "stem": None})
        >>> recipe.for_layer("head", "Linear").weight.bits, recipe.for_layer("stem.conv", "Conv2d")
        (4, None)
    """

    weight: WeightSpec = WeightSpec()
    activation: ActivationSpec = ActivationSpec()
    joins: bool = True
    outputs: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, LayerKeys | None] = field(default_factory=dict)
    first_last: int | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            patterns: Any = getattr(self, name)
            if isinstance(patterns, str):
                raise ValueError(
                    f"Recipe.{name} must be a list of patterns; got the string {patterns!r}. "
                    f"Write {name}=[{patterns!r}]."
                )
            object.__setattr__(self, name, tuple(patterns))
        for name, kind in (("weight", WeightSpec), ("activation", ActivationSpec)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"Recipe.{name} must be {_article(kind)}; got {getattr(self, name)!r}."
                )
        for name in ("joins", "outputs"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"Recipe.{name} must be true or false; got {getattr(self, name)!r}."
                )
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"Recipe.overrides must be a mapping; got {self.overrides!r}.")
        for pattern, change in self.overrides.items():
            self._overridden(LayerSpec(self.weight, self.activation), pattern, change)
        least: object = self.first_last
        if least is not None and not (_is_int(least) and least in range(2, 9)):
            raise ValueError(
                f"Recipe.first_last must be an int from 2 to 8, or null; got {least!r}."
            )

    def for_layer(
        self, name: str, kind: str, aliases: tuple[str, ...] = (), at_least: int = 0
    ) -> LayerSpec | None:
        """The specs of one layer, ``None`` when it stays float.

        A layer on its own does not know whether it is the first or the last: see ``with_ends``.

        Args:
            name: Dotted module name.
            kind: Name of the float class, such as ``Conv2d``.
            aliases: Further names of the same module; a pattern may match any of them.
            at_least: Bits that it has unless an override by name gives it others.
        """
        names = (name, *aliases)
        if self.include and not indexed(self.include).selecting(names, kind):
            return None
        if indexed(self.exclude).selecting(names, kind):
            return None
        default = LayerSpec(self.weight, self.activation)
        spec: LayerSpec | None = default
        selecting = indexed(tuple(self.overrides)).selecting(names, kind)
        # A name wins over a type, and over `first_last`.
        for by_type in (True, False):
            if not by_type:
                default = _with_bits(default, at_least)
                spec = None if spec is None else _with_bits(spec, at_least)
            for pattern in selecting:
                if is_type(pattern) is by_type:
                    change = self.overrides[pattern]
                    base = spec or default
                    spec = None if change is None else self._overridden(base, pattern, change)
        return spec

    def with_ends(self, ends: Iterable[tuple[str, str, tuple[str, ...]]]) -> Recipe:
        """This recipe with ``first_last`` spelled out as overrides of the layers that it is about.

        Args:
            ends: What ``for_layer`` takes, of the first and the last layer.

        Example:
            >>> recipe = Recipe(weight=WeightSpec(bits=4), first_last=8)
            >>> recipe.with_ends([("head", "Linear", ())]).for_layer("head", "Linear").weight.bits
            8
        """
        specs: dict[str, Any] = {}
        for name, kind, aliases in ends:
            spec = self.for_layer(name, kind, aliases, self.first_last or 0)
            if spec is not None:
                specs[glob.escape(name)] = asdict(spec)
        others = {p: c for p, c in self.overrides.items() if p not in specs}
        return replace(self, overrides=others | specs)

    def why_float(self, name: str, kind: str, aliases: tuple[str, ...] = ()) -> str | None:
        """The reason why a layer stays float, ``None`` when it is quantized."""
        names = (name, *aliases)
        if self.for_layer(name, kind, aliases) is not None:
            return None
        for pattern in indexed(self.exclude).selecting(names, kind):
            return f"excluded by the recipe (exclude: {pattern!r})"
        for pattern in indexed(tuple(self.overrides)).selecting(names, kind):
            if self.overrides[pattern] is None:
                return f"kept float by the recipe (overrides: {pattern!r}: None)"
        return "not selected by the recipe's include"

    def check_patterns(self, layers: Mapping[str, str], kinds: Iterable[str] = ()) -> None:
        """Refuse patterns that select nothing, and overrides that contradict each other.

        Two overrides contradict when both are of names (or both of types), give a layer different
        values, and the later one does not narrow the earlier: it selects other layers too, or the
        same ones. An override also contradicts ``exclude`` when that keeps all of its layers float.

        Args:
            layers: Dotted name to float class name of every layer of the model.
            kinds: Further class names that ``type:`` patterns may name without selecting anything,
                so that one recipe serves models with and without them.

        Raises:
            ValueError: Names every such pattern with the closest layer names, and every
                contradiction with both patterns and a layer.
        """
        problems = []
        candidates = [*layers.items(), *(("", kind) for kind in kinds)]
        selected = {prefix for name in layers for prefix in prefixes(name)}
        for where, patterns in (
            ("include", self.include),
            ("exclude", self.exclude),
            ("overrides", tuple(self.overrides)),
        ):
            plain = indexed(patterns).names & selected
            for pattern in patterns:
                if pattern in plain:
                    continue
                if not any(selects(pattern, name, kind) for name, kind in candidates):
                    types = {f"type:{kind}" for _, kind in candidates}
                    known = types if is_type(pattern) else layers
                    problems.append(
                        f"Pattern {pattern!r} in Recipe.{where} matches no layer; "
                        f"{closest(pattern, known)}."
                    )
        problems += contradictions(self.overrides, self.exclude, layers)
        if problems:
            raise ValueError("\n".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Primitives only: what YAML, JSON and checkpoints hold; ``Recipe.from_dict`` reads it."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from primitives.

        A key ``preset`` names the preset that the other keys change.

        Raises:
            ValueError: Unknown keys, with where they stand and the closest known ones.
        """
        values = dict(values)
        base = preset(values.pop("preset")) if "preset" in values else cls()
        return _changed(base, values, "Recipe")

    @classmethod
    def load(cls, source: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe from itself, a mapping, the name of a preset, or a file.

        A file is YAML or JSON with a recipe's keys, AMCT's JSON configuration (``.json``, told by
        its keys) or AMCT's simple configuration (``.cfg``).

        Raises:
            ValueError: No such preset or file, or its contents are no recipe.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        path = Path(source)
        if path.suffix not in _READERS:
            return preset(str(source))
        if not path.is_file():
            raise ValueError(f"Recipe file {str(path)!r} does not exist.")
        try:
            values = _READERS[path.suffix](path.read_text(encoding="utf-8"))
            if not isinstance(values, Mapping):
                raise ValueError(f"it must hold a mapping; got {type(values).__name__}.")
            return cls.from_dict(values)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"Recipe file {str(path)!r}: {error}") from error

    def _overridden(
        self, spec: LayerSpec, pattern: str, change: Mapping[str, Any] | None
    ) -> LayerSpec:
        where = f"Recipe.overrides[{pattern!r}]"
        if change is None:
            return spec
        _refuse_unknown(change, ("weight", "activation"), where)
        return LayerSpec(
            _changed(spec.weight, change.get("weight", {}), f"{where}.weight"),
            _changed(spec.activation, change.get("activation", {}), f"{where}.activation"),
        )


def _with_bits(spec: LayerSpec, at_least: int) -> LayerSpec:
    weight, activation = spec.weight, spec.activation
    return LayerSpec(
        replace(weight, bits=max(weight.bits, at_least)),
        replace(activation, bits=max(activation.bits, at_least)),
    )


def _article(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def _refuse_unknown(values: object, known: Iterable[str], where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping; got {values!r}.")
    for key in values:
        if key not in tuple(known):
            raise ValueError(f"{where} has no key {key!r}; {closest(str(key), known)}.")


def _changed(base: _Spec, values: Mapping[str, Any], where: str) -> _Spec:
    """``base`` with some fields replaced; nested specs are changed key by key."""
    _refuse_unknown(values, [f.name for f in fields(base)], where)
    changes: dict[str, Any] = {}
    for key, value in values.items():
        current = getattr(base, key)
        if isinstance(current, WeightSpec | ActivationSpec) and not isinstance(
            value, type(current)
        ):
            value = _changed(current, value, f"{where}.{key}")
        changes[key] = value
    return replace(base, **changes)


def _read_cfg(text: str) -> Mapping[str, Any]:
    # Here, because protobuf takes longer to import than the rest of this module.
    from lightning_qat.amct_cfg import parse_cfg

    return cfg_recipe(parse_cfg(text))


def _read_json(text: str) -> object:
    values = json.loads(text, object_pairs_hook=_unique_keys)
    return json_recipe(values) if isinstance(values, dict) and is_json_config(values) else values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"a key must come once in its object; {twice} come more often")
    return values


_READERS: Mapping[str, Callable[[str], object]] = {
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".json": _read_json,
    ".cfg": _read_cfg,
}
"""What a recipe file of each suffix is read by."""

PRESETS: Mapping[str, Recipe] = {
    "int8": Recipe(),
    "w4a8": Recipe(weight=WeightSpec(bits=4), first_last=8),
    "w4a4": Recipe(weight=WeightSpec(bits=4), activation=ActivationSpec(bits=4), first_last=8),
    "a16w8": Recipe(activation=ActivationSpec(bits=16, symmetric=True)),
    "amct": Recipe(
        weight=WeightSpec(quantizer="arq"),
        activation=ActivationSpec(quantizer="ulq", calibration="mse"),
        joins=False,
        outputs=False,
        exclude=AMCT_FLOAT,
        overrides={"type:Linear": {"weight": {"granularity": "per_tensor"}}},
    ),
}
"""Recipes by name: ``int8`` is what most targets want; those of 4 bits keep the first and the
last layer at 8, as LSQ does (arXiv:1902.08153); ``amct`` is Huawei AMCT's choice (inputs of layers
only)."""


def preset(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        ValueError: No such preset; the message lists them and the closest one.
    """
    if name not in PRESETS:
        raise ValueError(
            f"No recipe named {name!r}; {closest(name, PRESETS)}. Presets: {sorted(PRESETS)}. "
            f"A recipe file ends in {', '.join(_READERS)}."
        )
    return PRESETS[name]
