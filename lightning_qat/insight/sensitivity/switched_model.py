"""A copy of a model whose layers are quantized or not, and with how many bits, one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.calibrate.batches import observe
from lightning_qat.function_hooks.function_table import reader_kind
from lightning_qat.function_hooks.hooks import ModuleHooks, hooks_of
from lightning_qat.insight.sensitivity.consumers import called_quantizers, give_own_quantizers
from lightning_qat.layers import QATLayer
from lightning_qat.model.inputs import Inputs
from lightning_qat.numerics.multiplications import multiplications
from lightning_qat.quantizers import names
from lightning_qat.quantizers.activation import ActivationQuantizer, ParameterQuantizer
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.factory import activation_quantizer, weight_quantizer
from lightning_qat.quantizers.switches import switch
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.quantizers.weight_cache import QuantizedWeightCache
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.training.weights_once import use_weight_cache

Choice = int | None
"""How a unit is quantized: the bits of its weight, ``None`` float."""

Assignment = Mapping[str, Choice]
"""Unit to choice; units that are not named stay float."""


@dataclass(frozen=True)
class Unit:
    """What is quantized together: a layer's input and weight, or a tensor that no layer reads.

    Args:
        name: Dotted path of the layer, or of the call.
        kind: Float class of the layer, or the function that reads the tensor.
        bits: Of the weight by the recipe; of a tensor its own.
        input_bits: Of the input.
        weights: How many weights it has; 0: it is a tensor.
        quantizers: Its quantizers by path.
    """

    name: str
    kind: str
    bits: int
    input_bits: int
    weights: int
    quantizers: Mapping[str, Quantizer]

    @property
    def is_layer(self) -> bool:
        """Whether a recipe's overrides can name it."""
        return self.weights > 0

    def input_bits_at(self, bits: int) -> int:
        """Bits of the input when the weight has so many: the recipe's, and no fewer than these."""
        return self.input_bits if bits == self.bits else max(self.input_bits, bits)


class SwitchedModel:
    """A prepared, calibrated model in eval mode whose units are switched on and off.

    Args:
        model: The model, which is changed: quantizers that several layers share are copied.
        batches: What other numbers of bits are calibrated with.
        recipe: What the model was prepared with, its first and last layer named.

    Attributes:
        model: The model, for evaluations.
        units: In the order of registration.
        calls: Unit to what a call of the layer multiplies, of the layers that have run.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Inputs], recipe: Recipe) -> None:
        self.model = model
        self._batches = batches
        self._shared = give_own_quantizers(model)
        self.units = units_of(model, recipe)
        self.calls: dict[str, int] = {}
        self._called = called_quantizers(model)
        modules = dict(model.named_modules())
        self._hooks = [(m, found) for m in model.modules() if (found := hooks_of(m)) is not None]
        self._watched = True
        self._cache = QuantizedWeightCache()
        self._cache.open = True
        switch(model, observing=False, group=None)
        use_weight_cache(model, self._cache)
        self._numbers = {
            (q, q.spec.bits): _numbers(q) for unit in self.units for q in unit.quantizers.values()
        }
        self._own = {
            q: unit.input_bits if _has_bits_of_input(q) else q.spec.bits
            for unit in self.units
            for q in unit.quantizers.values()
        }
        for *_, path in self._shared:
            quantizer = modules[path]
            if quantizer in self._called and isinstance(quantizer, Quantizer):
                self._own[quantizer] = _bits_of_call(path, modules, recipe)

    def quantize(self, assignment: Assignment) -> None:
        """Quantize some units, and leave the others float.

        Args:
            assignment: Unit to bits.
        """
        wanted: dict[Quantizer, int] = {}
        by_path: dict[str, Quantizer] = {}
        for unit in self.units:
            by_path |= unit.quantizers
            bits = assignment.get(unit.name)
            for quantizer in unit.quantizers.values() if bits is not None else ():
                assert bits is not None
                wanted[quantizer] = self._bits_of(quantizer, unit, bits)
        for paths in self._shared:
            # As a recipe does it: all have the spec of the first layer that is quantized.
            on = [by_path[p] for p in paths if by_path[p] in wanted]
            for quantizer in on[1:]:
                wanted[quantizer] = wanted[on[0]]
        self._need(set(wanted.items()))
        self._watch(any(quantizer in self._called for quantizer in wanted))
        switch(self.model, quantizing=False)
        switch(wanted, quantizing=True)
        for quantizer, bits in wanted.items():
            if quantizer.spec.bits != bits:
                _become(quantizer, self._numbers[quantizer, bits])
        # What is kept does not know of bits.
        self._cache.forget()

    def watch_calls(self) -> Callable[[], None]:
        """Note from now on which layers run and what they multiply; the result ends it."""
        modules, handles = dict(self.model.named_modules()), []
        for unit in self.units:
            if unit.is_layer:
                hook = _counting(self.calls, unit)
                handles.append(modules[unit.name].register_forward_hook(hook))

        def stop() -> None:
            for handle in handles:
                handle.remove()

        return stop

    def never_run(self) -> tuple[str, ...]:
        """The layers that have not run while calls were watched."""
        by_call = {
            unit.name
            for unit in self.units
            if not self._called.isdisjoint(unit.quantizers.values())
        }
        layers = [unit.name for unit in self.units if unit.is_layer]
        return tuple(n for n in layers if n not in self.calls and n not in by_call)

    def _bits_of(self, quantizer: Quantizer, unit: Unit, bits: int) -> int:
        if not unit.is_layer or bits == unit.bits or isinstance(quantizer, ParameterQuantizer):
            return self._own[quantizer]
        if isinstance(quantizer, WeightQuantizer):
            return bits
        return max(self._own[quantizer], bits)

    def _watch(self, on: bool) -> None:
        """Hooks cost time in every call of a function; layers alone need none."""
        if on == self._watched:
            return
        self._watched = on
        for module, hooks in self._hooks:
            if on:
                hooks.attach(module)
            else:
                ModuleHooks.detach(hooks, module)

    def _need(self, wanted: set[tuple[Quantizer, int]]) -> None:
        """Have the numbers of quantizers at other bits than the recipe's."""
        missing = wanted - self._numbers.keys()
        if not missing:
            return
        for bits in sorted({bits for _, bits in missing}):
            self._make(bits)

    def _make(self, bits: int) -> None:
        """Make the numbers of all quantizers at some number of bits; activations are calibrated."""
        made, present = [], {quantizer: _numbers(quantizer) for quantizer in self._own}
        for quantizer in self._own:
            if (quantizer, bits) in self._numbers or isinstance(quantizer, ParameterQuantizer):
                continue
            _become(quantizer, _numbers(_with_bits(quantizer, bits)))
            made.append(quantizer)
        if any(isinstance(q, ActivationQuantizer) and _range_needs_data(q) for q in made):
            self._calibrate(made)
        for quantizer in made:
            self._numbers[quantizer, bits] = _numbers(quantizer)
            _become(quantizer, present[quantizer])

    def _calibrate(self, made: Sequence[Quantizer]) -> None:
        """Calibrate quantizers at other bits, and leave all others as they are."""
        kept = {
            q: _numbers(q)
            for q in self._own
            if isinstance(q, ActivationQuantizer) and not (q in made and _range_needs_data(q))
        }
        self._watch(True)
        observe(self.model, self._batches)
        for quantizer, numbers in kept.items():
            _become(quantizer, numbers)


def units_of(model: nn.Module, recipe: Recipe) -> tuple[Unit, ...]:
    """Everything that is quantized, each quantizer in one unit."""
    modules = dict(model.named_modules())
    layers = {
        path: module
        for path, module in modules.items()
        if isinstance(module, QATLayer) and not _is_inside(path, modules)
    }
    units, taken = [], set[nn.Module]()
    for path, module in modules.items():
        if path in layers:
            found = {
                f"{path}.{name}".lstrip("."): q
                for name, q in module.named_modules()
                if isinstance(q, Quantizer) and q not in taken and not _is_of_output(name)
            }
            kind = layers[path].float_class.__name__
            weights = sum(p.numel() for p in module.parameters() if p.dim() > 1)
        elif isinstance(module, Quantizer) and module not in taken:
            found, weights = {path: module}, 0
            kind = "weight" if isinstance(module, WeightQuantizer) else _function(path)
        else:
            continue
        taken |= set(found.values())
        if found:
            name = path if path in layers else names.place(path)
            bits = [q.spec.bits for q in found.values() if isinstance(q, WeightQuantizer)]
            inputs = [q.spec.bits for q in found.values() if isinstance(q, ActivationQuantizer)]
            spec = recipe.for_layer(path, kind) if path in layers else None
            if spec is not None and inputs:
                # A tensor that several layers read has the bits of the first one.
                inputs = [spec.activation.bits]
            units.append(Unit(name, kind, [*bits, *inputs][0], [*inputs, *bits][0], weights, found))
    return tuple(units)


def _is_inside(path: str, modules: Mapping[str, nn.Module]) -> bool:
    around = [path[:end] for end, c in enumerate(path) if c == "."]
    return any(isinstance(modules.get(name), QATLayer) for name in around)


def _is_of_output(path: str) -> bool:
    """Whether a quantizer is of what the model returns, which stays when its layer is float."""
    return names.JOINS in path and _function(path) == "output"


def _function(path: str) -> str:
    return path.rpartition(".")[2].rsplit("_", 2)[0]


@dataclass(frozen=True)
class _Numbers:
    """What makes a quantizer round as it does."""

    attributes: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


_ATTRIBUTES = ("spec", "grid", "calibrated", "seen", "ready")


def _numbers(quantizer: Quantizer) -> _Numbers:
    named = (*quantizer.named_parameters(), *quantizer.named_buffers())
    tensors = {name: tensor.detach().clone() for name, tensor in named}
    found = vars(quantizer)
    return _Numbers({name: found[name] for name in _ATTRIBUTES if name in found}, tensors)


@torch.no_grad()
def _become(quantizer: Quantizer, numbers: _Numbers) -> None:
    for name, value in numbers.attributes.items():
        setattr(quantizer, name, value)
    for name, tensor in numbers.tensors.items():
        getattr(quantizer, name).copy_(tensor)
    if isinstance(quantizer, ActivationQuantizer):
        quantizer.forget_qparams()


def _bits_of_call(path: str, modules: Mapping[str, nn.Module], recipe: Recipe) -> int:
    """The bits of an operand of a call, where no layer that is quantized reads it."""
    owner = names.owner_path(path)
    reader = reader_kind(_function(path))
    return recipe.for_call(owner, type(modules[owner]).__name__, reader).bits


def _has_bits_of_input(quantizer: Quantizer) -> bool:
    return isinstance(quantizer, ActivationQuantizer) and not isinstance(
        quantizer, ParameterQuantizer
    )


def _with_bits(quantizer: Quantizer, bits: int) -> Quantizer:
    """A quantizer of the same tensor with other bits; its range is the same, if it may be."""
    spec = replace(quantizer.spec, bits=bits)
    if isinstance(quantizer, WeightQuantizer):
        width = quantizer._parameters.get("half_width")
        channels = 1 if width is None else width.numel()
        return weight_quantizer(spec, quantizer.axis, channels, quantizer.groups)
    twin = activation_quantizer(spec)
    assert isinstance(quantizer, ActivationQuantizer)
    if spec.clip is None and quantizer.calibrated and not _range_needs_data(quantizer):
        for _ in range(spec.calibration_batches):
            twin.commit(torch.stack((-quantizer.min_val, quantizer.max_val)).cpu())
    return twin


def _range_needs_data(quantizer: ActivationQuantizer) -> bool:
    """Whether the best range depends on the number of bits."""
    spec = quantizer.spec
    return spec.clip is None and spec.calibration not in ("moving_average", "minmax", "percentile")


def _counting(calls: dict[str, int], unit: Unit) -> Any:
    """A hook that counts multiplications: weights times the places that each is used at."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        count = 0
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Embedding) or not isinstance(weight, Tensor):
                count = 0
            else:
                transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
                count = multiplications(
                    weight.shape, args[0].shape, output.shape, transposed=transposed
                )
        elif args and isinstance(args[0], Tensor) and args[0].dim():
            # Recurrent layers and attention: every step multiplies with every weight.
            count = unit.weights * math.prod(args[0].shape[:-1])
        calls[unit.name] = calls.get(unit.name, 0) + count

    return hook
