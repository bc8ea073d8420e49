"""The hooks on a module: they keep the stack of running forwards and enter the function mode.

No tracing and no change to the user's forward. A call is known by its module, its function, the
line of the forward that makes it, and how many such calls that line has made: another branch of the
code can never take a planned call's quantizer.

``joins/apply.py`` attaches hooks to the modules that make planned calls and to those around layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from lightning_qat.function_hooks.forward_cache import ForwardCache
from lightning_qat.function_hooks.frame import CallPlan, Frame
from lightning_qat.function_hooks.function_table import FUNCTION_TABLE
from lightning_qat.function_hooks.mode import QuantizeCallsMode
from lightning_qat.function_hooks.quantizer_protocol import InputQuantizer
from lightning_qat.function_hooks.recompute import to_be_run_again
from lightning_qat.function_hooks.running import current_forward_cache, hide_from_hooks, running
from lightning_qat.model.attributes import HOOKS
from lightning_qat.model.containers import map_leaves
from lightning_qat.model.forward import is_real_forward
from lightning_qat.model.torch_compile import (
    FunctionsForModes,
    constant_while_tracing,
    run_outside_graphs,
    trace_hooks_of_wrapped_modules,
)
from lightning_qat.model.torch_private import may_run_again, wrap_checkpointed_functions


class ModuleHooks:
    """The forward hooks of one module.

    Args:
        path: Dotted path of the module, for messages.
        sites: See ``CallPlan``.

    Attributes:
        plan: The quantizers of the module's calls.
    """

    def __init__(self, path: str, sites: Mapping[str, Mapping[int, InputQuantizer]]) -> None:
        self.plan = CallPlan(path, sites)
        self._handles: list[Any] = []

    def attach(self, module: nn.Module) -> None:
        """Install the hooks on a module; they replace hooks that were installed earlier."""
        earlier = hooks_of(module)
        if earlier is not None:
            earlier.detach(module)
        calls: Any = QuantizeCallsMode.__torch_function__
        run_outside_graphs([f.__code__ for f in (ModuleHooks.enter, ModuleHooks.leave, calls)])
        wrap_checkpointed_functions(to_be_run_again)
        trace_hooks_of_wrapped_modules(lambda module: hooks_of(module) is not None)
        self._handles = [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.leave, always_call=True),
        ]
        module.__dict__[HOOKS] = self

    def detach(self, module: nn.Module) -> None:
        """Remove the hooks from a module."""
        for handle in self._handles:
            handle.remove()
        module.__dict__.pop(HOOKS, None)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin the module's forward; torch calls this before it.

        Returns:
            The arguments for a forward that is traced; ``None``: they stay as they are.
        """
        now = running()
        caller = now.frames[-1] if now.frames else None
        frame = Frame(
            module, self.plan, path=self.plan.path, watched=is_real_forward(module), caller=caller
        )
        now.frames.append(frame)
        if not frame.watched:
            return None
        replaced = None
        forward_cache = current_forward_cache()
        if forward_cache is None:
            if is_dynamo_compiling():
                _add_functions_while_compiling()
                # A graph would be made anew for each input whose identity it has looked at.
                replaced = map_leaves(_aliases(), (args, kwargs))
            else:
                _FOR_MODES.watch_compilations()
                frame.handled = sys.exc_info()[1]
            # The outermost watched module; under activation checkpointing it may be any, and one
            # that torch.compile wraps begins anew.
            forward_cache = ForwardCache(
                traced=is_dynamo_compiling(), may_run_again=may_run_again()
            )
            now.open_cache(frame, forward_cache)
            if frame.outer_forward_cache is None:
                frame.mode = QuantizeCallsMode()
                frame.mode.__enter__()  # type: ignore[no-untyped-call]
        frame.run = forward_cache.runs[id(self)]
        forward_cache.runs[id(self)] += 1
        return replaced

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """End the module's forward; torch calls this after it, also when it raised.

        Returns:
            The output with quantized tensors in it; ``None``: the output stays as it is.
        """
        now = running()
        if not now.frames or now.frames[-1].plan is not self.plan:
            # Attached while the module was running: its call was never entered.
            return None
        frame = now.frames.pop()
        if not frame.watched:
            return None
        replaced = None
        try:
            if output is not None and self.plan.outputs:
                replaced = self._quantize_outputs(output, frame)
            if frame.forward_cache is not None and output is not None:
                given = output if replaced is None else replaced
                with hide_from_hooks():
                    leaves = frame.forward_cache.relu_fusion.read_all(given)
                    frame.forward_cache.relu_fusion.note_readers()
                replaced = replaced if leaves is given else leaves
            _commit(frame)
        finally:
            now.close(frame)
        return replaced

    def _quantize_outputs(self, output: Any, frame: Frame) -> Any:
        seen: list[None] = []

        def quantized(leaf: Any) -> Any:
            places = self.plan.outputs.get(len(seen))
            seen.append(None)
            if places is None or not isinstance(leaf, Tensor):
                return leaf
            # A forward may return something else in another mode: that is another tensor.
            operands = places.get(frame.made.get(id(leaf), ""))
            run = operands.get(frame.run) if operands is not None else None
            return leaf if run is None else run(leaf)

        return map_leaves(quantized, output)


def _aliases() -> Callable[[Any], Any]:
    """Make another tensor of the same memory of each tensor: the same one of the same."""
    known: list[tuple[Tensor, Tensor]] = []

    def alias(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for tensor, twin in known:
            if tensor is leaf:
                return twin
        known.append((leaf, leaf.view_as(leaf)))
        return known[-1][1]

    return alias


def _commit(frame: Frame) -> None:
    """Take what was observed into the ranges, at the end of a forward that has not raised."""
    cache = frame.forward_cache
    if cache is None or cache.observations is None:
        return
    # torch calls the hooks of a forward that raised while it handles the exception.
    if cache.traced or sys.exc_info()[1] is frame.handled:
        with hide_from_hooks():
            cache.observations.commit(cache.runs_again)


_FOR_MODES = FunctionsForModes(FUNCTION_TABLE, lambda: bool(running().frames))


@constant_while_tracing
def _add_functions_while_compiling() -> None:
    """Have ``torch.compile`` hand every function of the table to function modes."""
    _FOR_MODES.add_while_compiling()


def hooks_of(module: nn.Module) -> ModuleHooks | None:
    """The hooks that are installed on a module."""
    found: ModuleHooks | None = module.__dict__.get(HOOKS)
    return found
