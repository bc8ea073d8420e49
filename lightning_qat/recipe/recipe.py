"""``Recipe``: which layers get which quantizers. A frozen value that YAML can hold."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from lightning_qat.plain_data.text import read_text
from lightning_qat.recipe.amct_config import AMCT_FLOAT
from lightning_qat.recipe.checks import (
    choice_problem,
    first_lines,
    flag_problem,
    is_int,
    key_problems,
    pattern_problems,
    refuse,
    shown,
)
from lightning_qat.recipe.patterns import contradictions, indexed, is_type, prefixes, selects
from lightning_qat.recipe.readers import READERS
from lightning_qat.recipe.specs import (
    ActivationSpec,
    LayerSpec,
    WeightSpec,
)
from lightning_qat.recipe.suggest import closest_names
from lightning_qat.recipe.typed_dicts import LayerKeys

Joins = bool | Literal["fused_sums"]

SpecT = TypeVar("SpecT", bound="WeightSpec | ActivationSpec | Recipe")

_ARTICLES: Mapping[type[Any], str] = {WeightSpec: "a", ActivationSpec: "an"}


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
            ``"fused_sums"``: of a sum of a convolution's output and another tensor only the other
            one, the shortcut, so that TensorRT adds it inside the convolution's kernel.
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
        join_bits: How many bits what joins read has at least, where neither a layer nor a matrix
            product reads it as well: sums, norms and activation functions do no work that fewer
            bits would save, and their errors add up along a residual stream. What ``overrides``
            says of a name wins. ``None``: as many as inputs of layers.

    Raises:
        ValueError: Unknown keys (with the closest known ones) or values out of range.

    Example:
        >>> recipe = Recipe(overrides={"head": {"weight": {"bits": 4}}, "stem": None})
        >>> recipe.for_layer("head", "Linear").weight.bits, recipe.for_layer("stem.conv", "Conv2d")
        (4, None)
    """

    weight: WeightSpec = field(default=WeightSpec())
    activation: ActivationSpec = field(default=ActivationSpec())
    joins: Joins = True
    outputs: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, LayerKeys | None] = field(default_factory=dict)
    first_last: int | None = None
    join_bits: int | None = None

    def __post_init__(self) -> None:
        problems: list[str | None] = [
            flag_problem("Recipe.joins", self.joins, or_else="fused_sums"),
            flag_problem("Recipe.outputs", self.outputs),
        ]
        for name in ("include", "exclude"):
            patterns: Any = getattr(self, name)
            if isinstance(patterns, Iterator):
                patterns = tuple(patterns)
            wrong = pattern_problems(f"Recipe.{name}", patterns)
            problems += wrong
            object.__setattr__(self, name, () if wrong else tuple(patterns))
        specs: tuple[object, object] = self.weight, self.activation
        for name, spec, kind in zip(
            ("weight", "activation"), specs, (WeightSpec, ActivationSpec), strict=True
        ):
            if not isinstance(spec, kind):
                problems.append(
                    f"Recipe.{name} must be {_ARTICLES[kind]} {kind.__name__}; got {shown(spec)}"
                )
        if not isinstance(self.overrides, Mapping):
            problems.append(f"Recipe.overrides must be a mapping; got {shown(self.overrides)}")
        elif all(isinstance(spec, WeightSpec | ActivationSpec) for spec in specs):
            for pattern, change in self.overrides.items():
                problems += self._override_problems(pattern, change)
        for name in ("first_last", "join_bits"):
            least = getattr(self, name)
            if least is not None and not (is_int(least) and least in range(2, 9)):
                problems.append(
                    f"Recipe.{name} must be an int from 2 to 8, or null; got {shown(least)}"
                )
        refuse(*problems)

    def _override_problems(self, pattern: object, change: Any) -> list[str]:
        if not isinstance(pattern, str):
            return [f"Recipe.overrides: a pattern must be a text; got {shown(pattern)}"]
        try:
            self._overridden(LayerSpec(self.weight, self.activation), pattern, change)
        except ValueError as error:
            return str(error).splitlines()
        return []

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

    def for_call(
        self, module: str, kind: str, reader: Literal["join", "product", "output"]
    ) -> ActivationSpec:
        """The spec of what a call reads, or of what the model returns, where no layer reads it.

        Args:
            module: Dotted name of the module that makes the call.
            kind: Name of its class.
            reader: A matrix product, any other call, or the model's caller.

        Example:
            >>> recipe = Recipe(activation=ActivationSpec(bits=4), join_bits=8)
            >>> [recipe.for_call("", "Block", reader).bits for reader in ("join", "product")]
            [8, 4]
        """
        least = {"join": self.join_bits, "product": None, "output": self.first_last}[reader] or 0
        layer = self.for_layer(module, kind, at_least=least)
        # Also where the module stays float.
        spec = self.activation
        return layer.activation if layer else replace(spec, bits=max(spec.bits, least))

    def with_ends(self, ends: Iterable[tuple[str, str, tuple[str, ...]]]) -> Recipe:
        """This recipe with ``first_last`` written as overrides of the first and the last layer.

        Args:
            ends: Name, float class and aliases of the first and the last layer.

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
                        f"{closest_names(pattern, known)}."
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
            ValueError: Unknown keys, with where they stand and the closest known ones; values of
                another kind.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"A recipe must be a mapping; got {shown(values)}.")
        values = dict(values)
        base = preset(values.pop("preset")) if "preset" in values else cls()
        return _changed(base, values, "Recipe")

    @classmethod
    def load(cls, source: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe from itself, a mapping, the name of a preset, or a file.

        A file is YAML or JSON with a recipe's keys, AMCT's JSON configuration (``.json``, known by
        its keys) or AMCT's simple configuration (``.cfg``).

        Raises:
            ValueError: No such preset or file, or its contents are no recipe.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        path = Path(source)
        if path.suffix not in READERS:
            return preset(str(source))
        if not path.is_file():
            raise ValueError(f"Recipe file {str(path)!r} does not exist.")
        text = read_text(path)
        try:
            values = READERS[path.suffix](text)
            if not isinstance(values, Mapping):
                raise ValueError(f"it must hold a mapping; got {type(values).__name__}.")
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"Recipe file {str(path)!r}: {first_lines(str(error))}") from error

    def _overridden(
        self, spec: LayerSpec, pattern: str, change: Mapping[str, Any] | None
    ) -> LayerSpec:
        where = f"Recipe.overrides[{pattern!r}]"
        if change is None:
            return spec
        problems = key_problems(where, change, ("weight", "activation"))
        specs: list[Any] = []
        for name in ("weight", "activation") if isinstance(change, Mapping) else ():
            try:
                specs.append(_changed(getattr(spec, name), change.get(name, {}), f"{where}.{name}"))
            except ValueError as error:
                problems += str(error).splitlines()
        refuse(*problems)
        return LayerSpec(*specs)


def _with_bits(spec: LayerSpec, at_least: int) -> LayerSpec:
    weight, activation = spec.weight, spec.activation
    return LayerSpec(
        replace(weight, bits=max(weight.bits, at_least)),
        replace(activation, bits=max(activation.bits, at_least)),
    )


def _changed(base: SpecT, values: Mapping[str, Any], where: str) -> SpecT:
    """``base`` with some fields replaced; nested specs are changed key by key."""
    known = [f.name for f in fields(base)]
    problems = key_problems(where, values, known)
    changes: dict[str, Any] = {}
    given = values if isinstance(values, Mapping) else {}
    for key in [key for key in known if key in given]:
        current, value = getattr(base, key), given[key]
        try:
            if isinstance(current, WeightSpec | ActivationSpec) and not isinstance(
                value, type(current)
            ):
                value = _changed(current, value, f"{where}.{key}")
            changes[key] = value
        except ValueError as error:
            problems += str(error).splitlines()
    changed = base
    try:
        changed = replace(base, **changes)
    except ValueError as error:
        problems += str(error).splitlines()
    refuse(*problems)
    return changed


PRESETS: Mapping[str, Recipe] = {
    "int8": Recipe(),
    "w4a8": Recipe(weight=WeightSpec(bits=4, quantizer="learned"), first_last=8),
    "w4a4": Recipe(
        weight=WeightSpec(bits=4, quantizer="learned"),
        activation=ActivationSpec(bits=4, quantizer="learned", calibration="mse"),
        first_last=8,
        join_bits=8,
    ),
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
last layer at 8, and learn the scales of what has 4, as LSQ does (arXiv:1902.08153); ``w4a4`` keeps
sums and norms at 8 too; ``amct`` is Huawei AMCT's choice (inputs of layers only)."""


_OTHER_NAMES = {"w8a8": "int8", "a8w8": "int8", "w8a16": "a16w8", "a8w4": "w4a8", "a4w4": "w4a4"}


def preset(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        ValueError: No such preset; the message lists them and the closest one.
    """
    if not isinstance(name, str):
        refuse(choice_problem("preset", name, [*PRESETS]))
    if name in _OTHER_NAMES:
        raise ValueError(f"No recipe named {name!r}: it is called {_OTHER_NAMES[name]!r} here.")
    if name not in PRESETS:
        raise ValueError(
            f"No recipe named {name!r}; {closest_names(name, PRESETS)}. "
            f"Presets: {sorted(PRESETS)}. A recipe file ends in {', '.join(READERS)}."
        )
    return PRESETS[name]
