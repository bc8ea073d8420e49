"""The ``TorchFunctionMode`` that quantizes the planned operands of every torch function call.

``hooks.py`` enters it with the outermost forward; ``running.py`` says whose forward runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from lightning_qat.function_hooks.attention import (
    FUSED_ATTENTION,
    attention_arguments,
    attention_function,
)
from lightning_qat.function_hooks.call_site import (
    depends_on_mode,
    is_called_by_layer,
    is_called_for_weight,
    traced_depends_on_mode,
)
from lightning_qat.function_hooks.compact import compactly
from lightning_qat.function_hooks.forward_cache import ForwardCache
from lightning_qat.function_hooks.frame import CallPlan, Frame
from lightning_qat.function_hooks.function_table import (
    FUNCTION_TABLE,
    FunctionTraits,
    function_name,
    leads_with_real,
    operands_of,
    preserves_values,
)
from lightning_qat.function_hooks.operands import AnotherPath, quantize_operands
from lightning_qat.function_hooks.quantizer_protocol import InputQuantizer
from lightning_qat.function_hooks.relu_fusion import CLAMP_CALLS, ReluCallSite, ReluFusion
from lightning_qat.function_hooks.running import (
    current_forward_cache,
    hide_from_hooks,
    running,
)
from lightning_qat.model.torch_compile import constant_while_tracing
from lightning_qat.numerics.einsum import EINSUM, product

_TRACEABLE: Mapping[str, Callable[..., Any]] = {"unflatten": torch.unflatten}
"""torch 2.13 cannot trace a method that calls ``super()`` when a function mode hands it on."""


class QuantizeCallsMode(TorchFunctionMode):
    """Quantizes planned operands; every other call goes through unchanged."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is FUSED_ATTENTION:
            args, kwargs = attention_arguments(args, kwargs)
        if not is_dynamo_compiling():
            return self._call_and_note(func, args, kwargs)
        func = _TRACEABLE.get(func.__name__, func)
        if running().hidden:
            return func(*args, **kwargs)
        # While it traces, torch hands what a function calls inside to the mode as well.
        with hide_from_hooks():
            return self._call_and_note(func, args, kwargs)

    def _call_and_note(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = self._call(func, args, kwargs)
        frames = running().frames
        if frames and frames[-1].watched:
            frame = frames[-1]
            if frame.plan is not None and frame.plan.places:
                source = _handed_on(func, args, kwargs, result)
                frame.note_result(function_name(func), result, source)
        return result

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frames = running().frames
        frame = frames[-1] if frames else None
        forward_cache = current_forward_cache()
        if forward_cache is None or forward_cache.traced:
            return self._call_quantized(func, args, kwargs, frame)
        if func not in _READ_NO_VALUES and forward_cache.relu_fusion.contains_any(args, kwargs):
            args, kwargs = _read_in_float(forward_cache.relu_fusion, func, args, kwargs, frame)
        if frame is not None and frame.watched and func in CLAMP_CALLS:
            return self._call_clamp(func, args, kwargs, frame, forward_cache)
        result = self._call_quantized(func, args, kwargs, frame)
        if args:
            forward_cache.relu_fusion.note_in_place_change(args[0])
        return result

    def _call_clamp(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: Frame,
        forward_cache: ForwardCache,
    ) -> Any:
        """Call relu, fused with the only reader of its result where that is a quantizer."""
        counted = func in FUNCTION_TABLE
        key = frame.call_key("relu" if counted else "clamp")
        relu = CLAMP_CALLS[func](*args, **kwargs)
        if not key or forward_cache.is_on_grid(relu.input):
            return self._call_quantized(func, args, kwargs, frame)
        assert frame.plan is not None
        # A module may run several times in one forward.
        site = frame.plan.relu_sites.setdefault(f"{key}:{frame.run}", ReluCallSite())
        result = forward_cache.relu_and_quantizer(site, relu)
        if result is not None:
            frame.count_call(key)
            return result
        if not counted:
            frame.count_call(key)
        result = self._call_quantized(func, args, kwargs, frame)
        forward_cache.relu_fusion.record_result(site, relu, result)
        return result

    def _call_quantized(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: Frame | None,
    ) -> Any:
        """Call a function, its planned operands quantized."""
        known = FUNCTION_TABLE.get(func)
        if frame is not None and frame.saves_compactly:
            func = partial(compactly, func)
        if known is None:
            return _call_unlisted(func, args, kwargs)
        if frame is None or not frame.watched:
            return func(*args, **kwargs)
        plan = frame.plan
        assert plan is not None
        if known.of_layers and known.name not in plan.multiplies:
            return func(*args, **kwargs)
        key = frame.call_key(known.name)
        if known.of_layers and key not in plan.sites and is_called_by_layer():
            return func(*args, **kwargs)
        if not key:
            return func(*args, **kwargs)
        operands = plan.sites.get(key)
        if operands is None and is_called_for_weight():
            return func(*args, **kwargs)
        if not operands_of(known, args, kwargs):
            # Not the integers that a batch norm counts in training only.
            if leads_with_real(args):
                frame.count_call(key)
                if operands:
                    _warn_once(plan, key, "it has no longer the tensors it had")
            return func(*args, **kwargs)
        frame.count_call(key)
        if not operands:
            if operands is None and known.trait != "quantization_agnostic" and plan.plans_calls:
                _warn_once(plan, key, "it was not made", frame.training)
            return _call_listed(known, func, args, kwargs)
        try:
            changed = quantize_operands(known, operands, args, kwargs)
            if known.name == FUSED_ATTENTION.__name__:
                func = attention_function(operands, func)
            elif known.name == EINSUM.__name__:
                func = product
        except AnotherPath as reason:
            _warn_once(plan, key, str(reason))
            return func(*args, **kwargs)
        return _call_listed(known, func, *changed, original=args)


_GETTERS = (
    "shape ndim dtype device layout requires_grad is_leaf is_cuda is_sparse is_quantized is_nested"
)
_READ_NO_VALUES = frozenset(
    [getattr(Tensor, name).__get__ for name in _GETTERS.split()]
    + [Tensor.size, Tensor.stride, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement]
    + [Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__]
)
"""Functions that read no values (shape, dtype), so they never see a quantized tensor."""


def _read_in_float(
    relu_fusion: ReluFusion,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    frame: Frame | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with float values for all but planned operands."""
    known = FUNCTION_TABLE.get(func)
    operands: Mapping[int, InputQuantizer] = {}
    if known is not None and frame is not None and frame.watched:
        assert frame.plan is not None
        planned = frame.plan.sites.get(frame.call_key(known.name), {})
        operands = {known.first + i: q for i, q in planned.items() if i < known.operands}
    changes = known is not None and (known.in_place or bool(kwargs.get("inplace")))
    if known is None or known.trait == "concat" or changes:
        # Values that are tied are observed together, and the user's own tensor must change.
        operands = {}
    if any(index >= len(args) for index in operands):
        return args, kwargs
    given = tuple(x if i in operands else relu_fusion.read_all(x) for i, x in enumerate(args))
    return given, relu_fusion.read_all(kwargs)


def _handed_on(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Any:
    """The tensor that a call hands on; ``None``: it makes one of its own.

    ``contiguous`` returns the very tensor where its values lie in order, and so does dropout in
    eval mode, where outputs are planned; in training it returns another one.
    """
    known = FUNCTION_TABLE.get(func)
    if not args or known is None or known.in_place or bool(kwargs.get("inplace")):
        return None
    return args[0] if result is args[0] or known.name == "dropout" else None


def _call_unlisted(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that is not in the table; it may change a tensor in place."""
    result = func(*args, **kwargs)
    target = args[0] if args else None
    if result is target and isinstance(target, Tensor):
        forward_cache = current_forward_cache()
        if forward_cache is not None:
            forward_cache.note_in_place_change(target)
    return result


def _call_listed(
    known: FunctionTraits,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    original: tuple[Any, ...] | None = None,
) -> Any:
    """Call a function of the table; note whether its result has the values of an input."""
    source: Any = args[0] if args else None
    mutated = original[0] if original else source
    in_place = known.in_place or bool(kwargs.get("inplace"))
    if in_place and original is not None and original[0] is not source:
        # The quantized tensor may have other readers; the user's own one must change.
        result = original[0].copy_(func(source.clone(), *args[1:], **kwargs))
    else:
        result = func(*args, **kwargs)
    forward_cache = current_forward_cache()
    if forward_cache is None:
        return result
    if in_place and isinstance(mutated, Tensor):
        forward_cache.note_in_place_change(mutated)
    if known.trait == "concat":
        source = args[0][0] if args and args[0] else None
    keeps = known.trait == "concat" or preserves_values(known, args, kwargs)
    # Dropout scales what it keeps.
    keeps = keeps and not (known.name == "dropout" and kwargs.get("training", True))
    if keeps and isinstance(source, Tensor):
        for leaf in result if isinstance(result, list | tuple) else (result,):
            if isinstance(leaf, Tensor):
                forward_cache.note_same_values(source, leaf)
    return result


def _warn_once(plan: CallPlan, key: str, reason: str, in_training: bool = False) -> None:
    if plan.warned:
        return
    where = plan.path or "the model's own forward"
    if not in_training:
        plan.warned = True
        _warn(where, key, reason)
    elif traced_depends_on_mode() if is_dynamo_compiling() else depends_on_mode():
        # Noise, dropout, stochastic depth: they belong to training and to no plan.
        plan.sites[key] = {}
    else:
        plan.warned = True
        _warn_of_training(where, key)


@constant_while_tracing
def _warn_of_training(where: str, key: str) -> None:
    """Warn, while ``torch.compile`` traces too."""
    warnings.warn(
        f"The call {key} in {where!r} is made in training, not in eval mode with the inputs that "
        "were planned: it is not exported, and stays float. If it should be, plan with inputs with "
        "which forward makes it (example_inputs), or exclude that module in the recipe.",
        stacklevel=2,
    )


@constant_while_tracing
def _warn(where: str, key: str, reason: str) -> None:
    """Warn, while ``torch.compile`` traces too."""
    warnings.warn(
        f"The call {key} in {where!r} took another path than when its inputs were planned "
        f"({reason}); it stays float. Exclude that module in the recipe, or keep its forward "
        "the same for every input.",
        stacklevel=2,
    )
