"""Quantize the inputs of functional calls while a model's own forward runs, by a fixed table.

No tracing and no change to the user's forward: hooks on the modules that make such calls keep a
stack of who is running, and a ``TorchFunctionMode`` sees every torch function. A call is known by
its module, its function, the line of the forward it stands in, and how many such calls that line
has made: another branch of the code can never take a planned call's quantizer.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_qat.function_hooks.call_site import is_users, line_of_call, traced_line_of_call
from lightning_qat.function_hooks.compact import compactly
from lightning_qat.function_hooks.forward_cache import (
    ForwardCache,
    current_forward_cache,
    hidden,
    is_hidden,
    swap_forward_cache,
)
from lightning_qat.function_hooks.function_table import (
    FUNCTION_TABLE,
    FunctionTraits,
    leads_with_real,
    operands_of,
    preserves_values,
)
from lightning_qat.function_hooks.operands import AnotherPath, quantize_operands
from lightning_qat.function_hooks.relu_fusion import CLAMP_CALLS, ReluCallSite, ReluFusion
from lightning_qat.model.forward import is_real_forward

OUTPUT = "output:"
"""How the site of a module's own output is spelled, with the number of the tensor among them; its
operand is which run of the module in one forward it is."""


class ModuleHooks:
    """What is quantized in the calls that one module makes, and the hooks that see to it.

    Args:
        path: Dotted path of the module, for messages.
        sites: Quantizer per operand of each call; a call that stays float has no operands.
    """

    def __init__(self, path: str, sites: Mapping[str, Mapping[int, nn.Module]]) -> None:
        self.path = path
        self.sites = {call: dict(operands) for call, operands in sites.items()}
        self._outputs = {
            int(call.removeprefix(OUTPUT)): operands
            for call, operands in self.sites.items()
            if call.startswith(OUTPUT)
        }
        self.warned = False
        self.compact = False
        """Whether backward keeps little of the calls, not what is fast; see ``int_repr``."""
        self.relu_fusion: dict[str, ReluCallSite] = {}
        """Who reads what relu gives, by the place of its call."""
        self._handles: list[Any] = []

    def attach(self, module: nn.Module) -> None:
        """Watch over a module's forward; what watched over it before lets go."""
        earlier = hooks_of(module)
        if earlier is not None:
            earlier.detach(module)
        self._handles = [
            module.register_forward_pre_hook(self.enter),
            module.register_forward_hook(self.leave, always_call=True),
        ]
        module.__dict__["_qat_hooks"] = self

    def detach(self, module: nn.Module) -> None:
        """Let go of a module."""
        for handle in self._handles:
            handle.remove()
        module.__dict__.pop("_qat_hooks", None)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the module's forward."""
        frame = Frame(module, self, watched=is_real_forward(module))
        _LOCAL.frames.append(frame)
        if not frame.watched:
            return
        forward_cache = current_forward_cache()
        if forward_cache is None:
            _show_to_compile()
            # The outermost watched module; under activation checkpointing it may be any, and one
            # that torch.compile wraps begins anew.
            forward_cache = frame.forward_cache = ForwardCache(traced=is_dynamo_compiling())
            frame.outer_forward_cache = swap_forward_cache(forward_cache)
            if frame.outer_forward_cache is None:
                frame.mode = _JoinMode()
                frame.mode.__enter__()  # type: ignore[no-untyped-call]
        frame.number = forward_cache.calls[id(self)]
        forward_cache.calls[id(self)] += 1

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the module's forward, also when it raised."""
        frames = _LOCAL.frames
        if not frames or frames[-1].hooks is not self:
            # Attached while the module was running: its call was never entered.
            return None
        frame = frames.pop()
        if not frame.watched:
            return None
        replaced = None
        try:
            if output is not None and self._outputs:
                replaced = self._quantize_outputs(output, frame.number)
            if frame.forward_cache is not None and output is not None:
                given = output if replaced is None else replaced
                with hidden():
                    leaves = frame.forward_cache.relu_fusion.read_all(given)
                    frame.forward_cache.relu_fusion.learn()
                replaced = replaced if leaves is given else leaves
        finally:
            frame.close()
        return replaced

    @property
    def plans_calls(self) -> bool:
        """Whether calls were planned here, not only the module's outputs."""
        return len(self.sites) > len(self._outputs)

    def _quantize_outputs(self, output: Any, number: int) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        for index, operands in self._outputs.items():
            if number in operands and index < len(leaves) and isinstance(leaves[index], Tensor):
                leaves[index] = operands[number](leaves[index])
        return pytree.tree_unflatten(leaves, spec)


_frames: Any = torch._C._dynamo.eval_frame  # pyright: ignore
_skip = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT)
for _hook in (ModuleHooks.enter, ModuleHooks.leave):
    # The hooks of the very module that torch.compile wraps run outside of the graph, and must not
    # become graphs themselves; those of the modules inside it are part of it. (The public
    # decorators break the graph there.)
    _frames.set_code_exec_strategy(_hook.__code__, _skip)


class Frame:
    """One running forward of a module, and the calls it has made so far.

    Args:
        module: The module.
        interception: What watches over it, if anything does.
        watched: Whether its own forward runs.
    """

    def __init__(
        self, module: nn.Module, hooks: ModuleHooks | None = None, *, watched: bool = True
    ) -> None:
        self.hooks = hooks
        self.watched = watched
        self.number = 0
        self.mode: _JoinMode | None = None
        self.forward_cache: ForwardCache | None = None
        self.outer_forward_cache: ForwardCache | None = None
        self._calls: Counter[str] = Counter()
        # Code of torch's own modules and of ours is the same for everybody, and who calls them is
        # not theirs.
        self._users = is_users({"__name__": type(module).__module__})

    @property
    def keeps_little(self) -> bool:
        """Whether backward shall keep little of what is called now."""
        return self.hooks is not None and self.hooks.compact and not is_dynamo_compiling()

    def close(self) -> None:
        """End what began with this forward."""
        if self.mode is not None:
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if self.forward_cache is not None:
            swap_forward_cache(self.outer_forward_cache)
            self.forward_cache.close()

    def place(self, name: str) -> str:
        """How the next call of a function is known: ``add@forward+3:0``.

        Empty when a graph that torch.compile made runs: what it calls was seen when it was made.
        """
        line = traced_line_of_call() if is_dynamo_compiling() else line_of_call()
        if line is None:
            return ""
        line = line if self._users else ""
        return f"{name}{line}:{self._calls[name + line]}"

    def count(self, place: str) -> None:
        """Note that the call of this place is made."""
        self._calls[place.rpartition(":")[0]] += 1


class _Local(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []


_LOCAL = _Local()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _show_to_compile() -> None:
    """Have ``torch.compile`` hand every join to function modes.

    torch 2.13 keeps those back that ``torch.overrides`` does not list: hardswish, hardsigmoid, pad.
    """
    dynamo: Any = sys.modules.get("torch._dynamo.variables.torch")
    if dynamo is not None:
        dynamo.get_overridable_functions().update(FUNCTION_TABLE)


_TRACEABLE: Mapping[str, Callable[..., Any]] = {"unflatten": torch.unflatten}
"""torch 2.13 cannot trace a method that calls ``super()`` when a function mode hands it on."""


class _JoinMode(TorchFunctionMode):
    """Hands planned operands to their quantizers; every other call goes through unchanged."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not is_dynamo_compiling():
            return self._call(func, args, kwargs)
        func = _TRACEABLE.get(func.__name__, func)
        if is_hidden():
            return func(*args, **kwargs)
        # While it traces, torch hands what a function calls inside to the mode as well.
        with hidden():
            return self._call(func, args, kwargs)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = _LOCAL.frames[-1] if _LOCAL.frames else None
        forward_cache = current_forward_cache()
        if forward_cache is None or forward_cache.traced:
            return self._quantized(func, args, kwargs, frame)
        if func not in _TELL_NO_VALUE and forward_cache.relu_fusion.contains_any(args, kwargs):
            args, kwargs = _in_float(forward_cache.relu_fusion, func, args, kwargs, frame)
        if frame is not None and frame.watched and func in CLAMP_CALLS:
            return self._relu(func, args, kwargs, frame, forward_cache)
        result = self._quantized(func, args, kwargs, frame)
        if args:
            forward_cache.relu_fusion.note_in_place_change(args[0])
        return result

    def _relu(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: Frame,
        forward_cache: ForwardCache,
    ) -> Any:
        """Call relu, together with the only reader of its result where that is a quantizer."""
        counted = func in FUNCTION_TABLE
        place = frame.place("relu" if counted else "clamp")
        relu = CLAMP_CALLS[func](*args, **kwargs)
        if not place or forward_cache.is_on_grid(relu.input):
            return self._quantized(func, args, kwargs, frame)
        assert frame.hooks is not None
        # A module may run several times in one forward.
        site = frame.hooks.relu_fusion.setdefault(f"{place}:{frame.number}", ReluCallSite())
        result = forward_cache.relu_and_quantizer(site, relu)
        if result is not None:
            frame.count(place)
            return result
        if not counted:
            frame.count(place)
        result = self._quantized(func, args, kwargs, frame)
        forward_cache.relu_fusion.record_result(site, relu, result)
        return result

    def _quantized(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: Frame | None,
    ) -> Any:
        """Call a function, its planned operands quantized."""
        known = FUNCTION_TABLE.get(func)
        if frame is not None and frame.keeps_little:
            func = partial(compactly, func)
        if known is None:
            return _unknown(func, args, kwargs)
        if frame is None or not frame.watched:
            return func(*args, **kwargs)
        hooks, place = frame.hooks, frame.place(known.name)
        assert hooks is not None
        if not place:
            return func(*args, **kwargs)
        operands = hooks.sites.get(place)
        if not operands_of(known, args, kwargs):
            # Not the integers that a batch norm counts in training only.
            if leads_with_real(args):
                frame.count(place)
                if operands:
                    _warn_once(hooks, place, "it has no longer the tensors it had")
            return func(*args, **kwargs)
        frame.count(place)
        if not operands:
            if operands is None and known.trait != "quantization_agnostic" and hooks.plans_calls:
                _warn_once(hooks, place, "it was not made")
            return _passed_on(known, func, args, kwargs)
        try:
            changed = quantize_operands(known, operands, args, kwargs)
        except AnotherPath as reason:
            _warn_once(hooks, place, str(reason))
            return func(*args, **kwargs)
        return _passed_on(known, func, *changed, original=args)


_GETTERS = (
    "shape ndim dtype device layout requires_grad is_leaf is_cuda is_sparse is_quantized is_nested"
)
_TELL_NO_VALUE = frozenset(
    [getattr(Tensor, name).__get__ for name in _GETTERS.split()]
    + [Tensor.size, Tensor.stride, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement]
    + [Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__]
)
"""What tells of a tensor nothing that quantization changes."""


def _in_float(
    relu_fusion: ReluFusion,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    frame: Frame | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with float values for all but planned operands."""
    known = FUNCTION_TABLE.get(func)
    operands: Mapping[int, nn.Module] = {}
    if known is not None and frame is not None and frame.watched:
        assert frame.hooks is not None
        operands = frame.hooks.sites.get(frame.place(known.name), {})
    changes = known is not None and (known.in_place or bool(kwargs.get("inplace")))
    if known is None or known.trait == "concat" or changes:
        # Values that are tied are observed together, and the user's own tensor must change.
        operands = {}
    if any(index >= len(args) for index in operands):
        return args, kwargs
    given = tuple(x if i in operands else relu_fusion.read_all(x) for i, x in enumerate(args))
    return given, relu_fusion.read_all(kwargs)


def _unknown(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that is neither a join nor passing; it may change a tensor in place."""
    result = func(*args, **kwargs)
    target = args[0] if args else None
    if result is target and isinstance(target, Tensor):
        forward_cache = current_forward_cache()
        if forward_cache is not None:
            forward_cache.changed(target)
    return result


def _passed_on(
    known: FunctionTraits,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    original: tuple[Any, ...] | None = None,
) -> Any:
    """Call the function; note what its result is made of."""
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
        forward_cache.changed(mutated)
    if known.trait == "concat":
        source = args[0][0] if args and args[0] else None
    keeps = known.trait == "concat" or preserves_values(known, args, kwargs)
    # Dropout scales what it keeps.
    keeps = keeps and not (known.name == "dropout" and kwargs.get("training", True))
    if keeps and isinstance(source, Tensor):
        for leaf in result if isinstance(result, list | tuple) else (result,):
            if isinstance(leaf, Tensor):
                forward_cache.passes(source, leaf)
    return result


def _warn_once(hooks: ModuleHooks, place: str, reason: str) -> None:
    if not hooks.warned:
        hooks.warned = True
        _warn(hooks.path or "the model's own forward", place, reason)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn(where: str, place: str, reason: str) -> None:
    """Warn, while ``torch.compile`` traces too."""
    warnings.warn(
        f"The call {place} in {where!r} took another path than when its inputs were planned "
        f"({reason}); it stays float. Exclude that module in the recipe, or keep its forward "
        "the same for every input.",
        stacklevel=2,
    )


def unwind() -> None:
    """Forget forwards that ended without their hooks.

    torch runs no hook after a forward that raised while it was exported, or that was interrupted
    from the keyboard.
    """
    while _LOCAL.frames:
        _LOCAL.frames.pop().close()


def hooks_of(module: nn.Module) -> ModuleHooks | None:
    """What watches over a module."""
    found: ModuleHooks | None = module.__dict__.get("_qat_hooks")
    return found
