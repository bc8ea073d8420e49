"""Find every tensor that needs a quantizer by running a model once: no tracing, no rewriting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_qat.function_hooks.forward_cache import Key, key_of
from lightning_qat.function_hooks.frame import OUTPUT, Frame
from lightning_qat.function_hooks.function_table import (
    FUNCTION_TABLE,
    FunctionTraits,
    fixed_output_range,
    leads_with_real,
    operands_of,
    preserves_values,
)
from lightning_qat.joins.plan import JoinPlan, PlannedTensor
from lightning_qat.joins.solver import INPUT, _Event, _Groups, _Operand, _Origin
from lightning_qat.layers import QATLayer
from lightning_qat.layers.table import WITH_WEIGHTS
from lightning_qat.model.dry_run import call_of, without_trace
from lightning_qat.model.forward import is_real_forward
from lightning_qat.model.inputs import Inputs
from lightning_qat.model.paths import ModelPaths
from lightning_qat.model.torch_compile import is_compiled
from lightning_qat.model.torch_private import saved_tensors_are_hooked, without_function_modes
from lightning_qat.numerics.calibration.updates import BY_RANGE
from lightning_qat.numerics.min_max import batch_range
from lightning_qat.quantizers import names
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.factory import learns
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec

EMPTY = "empty tensors"

_COUNTED = (*WITH_WEIGHTS, QATLayer, nn.modules.batchnorm._BatchNorm)
"""Layers whose own arithmetic is accounted for elsewhere: in the report, or folded."""
_NO_VALUES = frozenset(
    "to float double half bfloat16 type type_as cpu cuda requires_grad_ __get__ __set__ "
    "__setitem__ zeros_like ones_like empty_like full_like rand_like randn_like bernoulli "
    "new_zeros new_ones new_full new_empty new_tensor".split()
)
"""Functions that make no new values of a tensor's."""


class Discovery:
    """Watches one forward of a model and makes the plan of its quantized tensors.

    Every consumer of a tensor shares one quantizer; functions that keep values hand the grid on;
    the inputs of a concatenation are tied to one; the outputs of the model are consumers, too.

    Args:
        model: A model with its QAT layers.
        recipe: Says which modules stay float and gives the specs of joins.
        paths: The model's present paths, where the caller has them.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, paths: ModelPaths | None = None) -> None:
        self.model, self.recipe = model, recipe
        self.paths = paths or ModelPaths.of(model)
        self._events: list[_Event] = []
        self._origins: dict[Key, _Origin] = {}
        self._owners: dict[str, None] = {}
        self._left_float: dict[str, None] = {}
        self._returned: dict[Key, _Operand] = {}
        self._frames: list[tuple[str, Frame] | None] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._known: dict[str, dict[str, None]] = {}
        self._alive: list[Any] = []
        self._runs: Counter[str] = Counter()
        self.checkpointed = False
        """Whether saved tensors were hooked while a module ran."""
        self._ranges: dict[Key, Tensor] = {}
        self._members: dict[str, list[Key]] = {}
        self._modules = self.paths.by_path

    @contextmanager
    def watching(self, *, root_runs: bool = False) -> Iterator[None]:
        """Watch every module and torch function inside the block.

        Args:
            root_runs: The model's own forward is running already.
        """
        handles = []
        for module, (path, *_) in self.paths.names.items():
            if root_runs and not path:
                self._frames.append((path, Frame(module)))
                continue
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        eager: Any = torch.compiler.set_stance("force_eager")
        stance: Any = eager if is_compiled(self.model) else nullcontext()
        try:
            with stance, _Watch(self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def outputs(self, output: Any) -> None:
        """Note what the model returns: with ``outputs=True`` its float tensors are consumed."""
        if self._frames:
            self._leave(self.model, (), output)
        for leaf in pytree.tree_leaves(output) if self.recipe.outputs else ():
            if is_dataclass(leaf):
                kind = type(leaf).__name__
                text = f"torch does not look into {kind}; call torch.export.register_dataclass"
                self._left_float[f"output: {text}({kind})"] = None
            if not isinstance(leaf, Tensor):
                continue
            place = self._returned.get(key_of(leaf))
            if place is not None and leaf.is_floating_point() and leaf.dim() and leaf.numel():
                self._owners[place.module] = None
                self._note_range(leaf)
                self._events.append(_Event((place,), (key_of(leaf),)))

    # ------------------------------------------------------------------ watching

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        path = self.paths.name(module)
        if isinstance(module, ActivationQuantizer):
            layer, _, name = path.rpartition(".")
            if name == names.INPUT and args and isinstance(args[0], Tensor):
                self._consume(layer, args[0])
        self.checkpointed = self.checkpointed or saved_tensors_are_hooked()
        hidden = isinstance(module, Quantizer) or not is_real_forward(module)
        self._frames.append(None if hidden else (path, Frame(module)))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = self._frames.pop()
        if frame is None:
            return
        for number, leaf in enumerate(pytree.tree_leaves(output)):
            if isinstance(leaf, Tensor):
                if _is_opaque(module):
                    self._origins[key_of(leaf)] = _Origin(frame[0])
                # The innermost module that returns a tensor returns first.
                run = self._runs[frame[0]]
                place = _Operand(frame[0], "output", number, run, f"{OUTPUT}{number}")
                self._returned.setdefault(key_of(leaf), place)
                self._alive.append(leaf)
        self._runs[frame[0]] += 1

    def _consume(self, layer: str, x: Tensor) -> None:
        self._alive.append(x)
        self._note_range(x)
        self._events.append(_Event((_Operand(layer, INPUT, 0, 0),), (key_of(x),)))

    def _note_range(self, x: Tensor) -> None:
        """At once: the tensor may be changed in place later."""
        if self.model.training and key_of(x) not in self._ranges and x.numel():
            with without_function_modes():
                self._ranges[key_of(x)] = batch_range(x)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one torch function and note what it does to quantization."""
        frame = self._frames[-1] if self._frames else None
        if frame is None or _is_opaque(self._modules[frame[0]]):
            return func(*args, **kwargs)
        known, path = FUNCTION_TABLE.get(func), frame[0]
        name = getattr(func, "__name__", "function").strip("_")
        number, place = 0, ""
        tensors = () if known is None else operands_of(known, args, kwargs)
        keys = tuple(key_of(t) for t in tensors)
        self._alive += tensors
        if known is not None and tensors:
            name, place = known.name, frame[1].call_key(known.name)
            number = self._counts[path, name]
            self._counts[path, name] += 1
            frame[1].count_call(place)
            self._owners[path] = None
            self._known.setdefault(path, {})[place] = None
            for tensor in tensors:
                self._note_range(tensor)
        elif known is not None and leads_with_real(args):
            place = frame[1].call_key(known.name)
            frame[1].count_call(place)
            self._known.setdefault(path, {})[place] = None
        result = func(*args, **kwargs)
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        outs = tuple(key_of(leaf) for leaf in leaves if leaf.is_floating_point())
        self._alive += leaves
        made = f"{path}.{name}" if path else name
        natural = fixed_output_range(func, args, kwargs)
        for key in outs:
            if key not in keys:
                self._origins[key] = _Origin(
                    made, natural, name == "relu" or bool(natural and natural[0] >= 0)
                )
        if known is not None and tensors:
            self._note(known, _Call(path, name, number, place), tensors, keys, outs, args, kwargs)
        elif natural is None and self._computes(frame[0], func, args, kwargs, leaves):
            self._left_float[f"{made}: no integer form is known"] = None
        return result

    def _computes(
        self,
        path: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        results: list[Tensor],
    ) -> bool:
        """Whether a call that is neither join nor passing makes new values of a tensor."""
        name = getattr(func, "__name__", "")
        if isinstance(self._modules[path], _COUNTED) or name in _NO_VALUES:
            return False
        leaves = pytree.tree_leaves((args, kwargs))
        given = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.dim()]
        in_place = name.endswith("_") and not name.endswith("__")
        return bool(given) and any(
            t.is_floating_point() and t.dim() and (in_place or all(t is not x for x in given))
            for t in results
        )

    def _note(
        self,
        known: FunctionTraits,
        call: _Call,
        tensors: tuple[Tensor, ...],
        keys: tuple[Key, ...],
        outs: tuple[Key, ...],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        if preserves_values(known, args, kwargs):
            # Dropout in eval mode gives its very input back.
            if keys and outs[:1] != keys[:1]:
                self._inherit(keys[0], outs, known.name)
                self._events.append(_Event((call.operand(0),), keys[:1], outs, quantizes=False))
            return
        reason = self._why_float(known, call.module, tensors)
        if reason is not None:
            self._left_float[f"{call.operand(0)}: {reason}"] = None
            return
        tie = known.trait == "concat"
        where = tuple(call.operand(0 if tie else i) for i in range(len(keys)))
        if tie:
            self._events.append(_Event(where, keys, outs))
        else:
            self._events += [_Event((w,), (k,)) for w, k in zip(where, keys, strict=True)]

    def _inherit(self, source: Key, outs: tuple[Key, ...], name: str) -> None:
        """What is known of a tensor's range holds for its reshaped and pooled values."""
        origin = self._origins.get(source)
        for key in outs:
            own = self._origins.get(key)
            if origin is not None and name == "dropout":
                self._origins[key] = origin
            elif origin is not None and own is not None and own.natural is None:
                own.not_negative = own.not_negative or origin.not_negative
                own.natural = origin.natural if name != "relu" else None

    def _why_float(
        self, known: FunctionTraits, path: str, tensors: tuple[Tensor, ...]
    ) -> str | None:
        """Why a join stays float; ``None``: it is quantized."""
        if not all(t.numel() for t in tensors):
            return EMPTY
        if not self.recipe.joins:
            return "the recipe has joins=False"
        kind = type(self._modules[path]).__name__
        if self.recipe.for_layer(path, kind) is None:
            return f"{path or 'the root'} is not selected by the recipe"
        return None

    # ------------------------------------------------------------------ the plan

    def plan(self) -> JoinPlan:
        """The plan of what was seen."""
        groups = _Groups()
        needed = {key for event in self._events if event.quantizes for key in event.tensors}
        # What is upsampled is quantized before, where it is small, and by what makes it.
        for event in reversed(self._events):
            if event.where[0].function == "interpolate" and needed & set(event.passes):
                needed.add(event.tensors[0])
        grid: dict[Key, int] = {}
        inherited: set[Key] = set()
        roots: dict[int, list[Key]] = {}
        used: dict[_Operand, int] = {}

        def group_of(key: Key) -> int:
            if key not in grid:
                grid[key] = groups.new()
                roots[grid[key]] = [key]
            return grid[key]

        for event in self._events:
            first = event.tensors[0]
            if not (event.quantizes or first in grid or first in needed):
                continue
            numbers = [group_of(key) for key in event.tensors]
            for number in numbers[1:]:
                groups.join(numbers[0], number)
            # A passing function needs no quantizer for what is on a grid by inheritance.
            if event.quantizes or first not in inherited:
                for place, number in zip(event.where, numbers, strict=True):
                    groups.join(used.setdefault(place, number), number)
            for key in event.passes:
                grid[key] = numbers[0]
                inherited.add(key)
        return self._named(groups, roots, used)

    def observe(self) -> None:
        """Give quantizers that have seen nothing yet what this forward, in training, had for them.

        To be called after the plan has been applied to the model.
        """
        modules = ModelPaths.of(self.model).by_path
        for path, keys in self._members.items():
            quantizer = modules[path]
            seen = [self._ranges[key] for key in keys if key in self._ranges]
            assert isinstance(quantizer, ActivationQuantizer)
            fresh = not quantizer.calibrated and quantizer.pending is None
            searched = quantizer.spec.calibration not in BY_RANGE
            if fresh and seen and quantizer.observing and not searched:
                quantizer.observe(torch.stack(seen).amax(0))

    def release(self) -> None:
        """Let the forward's tensors go; the plan is made."""
        self._alive.clear()

    def _named(
        self, groups: _Groups, roots: Mapping[int, list[Key]], used: Mapping[_Operand, int]
    ) -> JoinPlan:
        places: dict[int, list[_Operand]] = {}
        for place, number in used.items():
            places.setdefault(groups.find(number), []).append(place)
        keys: dict[int, list[Key]] = {}
        for number, members in roots.items():
            keys.setdefault(groups.find(number), []).extend(members)
        tensors, names = [], {}
        for number, consumers in places.items():
            layers = [p for p in consumers if p.function == INPUT]
            owner = (layers or consumers)[0]
            name = _path(owner)
            origins = [self._origins.get(key) or _Origin(INPUT) for key in keys[number]]
            spec = self._spec(owner, origins)
            names[number] = name
            self._members[name] = keys[number]
            producers = tuple(dict.fromkeys(origin.name for origin in origins))
            tensors.append(PlannedTensor(name, spec, producers, tuple(map(str, consumers))))
        sites: dict[str, dict[str, dict[str, str]]] = {
            path: {place: {} for place in self._known.get(path, ())} for path in self._owners
        }
        links: dict[str, str] = {}
        for place, number in used.items():
            name = names[groups.find(number)]
            if place.function != INPUT:
                calls = sites.setdefault(place.module, {})
                calls.setdefault(place.place, {})[str(place.operand)] = name
            elif _path(place) != name:
                links[place.module] = name
        return JoinPlan(tuple(tensors), sites, links, tuple(self._left_float))

    def _spec(self, owner: _Operand, origins: list[_Origin]) -> ActivationSpec:
        if owner.function == INPUT:
            spec: ActivationSpec = self._modules[_path(owner)].spec  # type: ignore[assignment]
        else:
            kind = type(self._modules[owner.module]).__name__
            least = self.recipe.first_last if owner.place.startswith(OUTPUT) else None
            layer = self.recipe.for_layer(owner.module, kind, at_least=least or 0)
            spec = layer.activation if layer is not None else self.recipe.activation
        if spec.symmetric or spec.clip is not None or spec.fixed_min is not None:
            return spec
        natural = {origin.natural for origin in origins}
        if learns(spec):
            # What is learned may well be narrower than what a function can give.
            natural = {None}
        if len(natural) == 1 and None not in natural:
            return replace(spec, clip=natural.pop())
        if all(origin.not_negative for origin in origins):
            return replace(spec, fixed_min=True)
        return spec


@dataclass(frozen=True)
class _Call:
    module: str
    function: str
    number: int
    place: str

    def operand(self, number: int) -> _Operand:
        return _Operand(self.module, self.function, self.number, number, self.place)


class _Watch(TorchFunctionMode):
    def __init__(self, discovery: Discovery) -> None:
        super().__init__()
        self._discovery = discovery

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self._discovery.call(func, args, kwargs or {})


def _is_opaque(module: nn.Module) -> bool:
    return isinstance(module, QATLayer) and module.opaque


def _path(place: _Operand) -> str:
    """Dotted path of the quantizer that is named after a place."""
    if place.function == INPUT:
        return names.input_path(place.module)
    return names.join_path(place.module, place.function, place.call, place.operand)


def discover(
    model: nn.Module, recipe: Recipe, example_inputs: Inputs, paths: ModelPaths | None = None
) -> JoinPlan:
    """Run a model once in eval mode, without gradient and without leaving a trace, and plan it.

    Args:
        model: A model with its QAT layers.
        recipe: As for ``Discovery``.
        example_inputs: What ``forward`` takes.
        paths: The model's present paths, where the caller has them.
    """
    discovery = Discovery(model, recipe, paths)
    args, kwargs = call_of(model, example_inputs)
    with without_trace(model), discovery.watching():
        output = model(*args, **kwargs)
    discovery.outputs(output)
    return discovery.plan()
