"""Everything that touches ``torch.compile``: its names in paths, and dynamo's private parts.

Importing this file changes nothing. ``require_support`` looks for every private part at once, so
that a torch without one of them is told so when a compiled model is prepared, and can do everything
else.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from types import CodeType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_WRAPPED = "_orig_mod"

_Function = TypeVar("_Function", bound=Callable[..., Any])

_NEEDED = {
    "torch._C._dynamo.eval_frame": ("_FrameExecStrategy", "_FrameAction", "set_code_exec_strategy"),
    "torch._dynamo.callback": (
        "callback_handler.register_start_callback",
        "callback_handler.register_end_callback",
        "callback_handler.end_callbacks",
    ),
    "torch._dynamo.config": ("wrap_top_frame",),
    "torch._dynamo.eval_frame": ("OptimizedModule._initialize",),
    "torch._dynamo.resume_execution": ("ContinueExecutionCache.generated_code_metadata",),
    "torch._dynamo.symbolic_convert": ("InstructionTranslator.current_tx",),
    "torch._dynamo.variables.torch": ("get_overridable_functions",),
}
"""Module to the private names that this file uses, dotted."""

_CONSTANT = "_dynamo_marked_constant"
"""The attribute of functions whose results dynamo takes for constants."""


def plain_path(path: str) -> str:
    """A dotted path without the names that ``torch.compile`` puts into it.

    Example:
        >>> plain_path("net._orig_mod.conv")
        'net.conv'
    """
    return ".".join(name for name in path.split(".") if name != _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, where ``torch.compile`` has wrapped it."""
    # The table of a TorchScript module is no dict.
    while _WRAPPED in module._modules:
        module = module._modules[_WRAPPED]  # type: ignore[assignment]
    return module


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of a model was given to ``torch.compile``."""
    return any(
        _WRAPPED in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextmanager
def without_compiling() -> Iterator[None]:
    """Run what is compiled, parts of a model or functions that call it, as if it were not.

    torch changes its stance where ``set_stance`` is called, not where the block begins. Nothing is
    compiled before dynamo is loaded.
    """
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def missing_parts() -> list[str]:
    """The private names that this file uses and that this torch does not have."""
    missing = []
    for module_name, names in _NEEDED.items():
        try:
            module = _imported(module_name)
        except (ImportError, AttributeError):
            missing.append(module_name)
            continue
        for name in names:
            try:
                attrgetter(name)(module)
            except AttributeError:
                missing.append(f"{module_name}.{name}")
    if not _marks_constants():
        missing.append(_CONSTANT)
    return missing


def _imported(name: str) -> Any:
    if name.startswith("torch._C."):
        # No module of a file of its own: an attribute of the extension.
        return attrgetter(name.removeprefix("torch."))(torch)
    return importlib.import_module(name)


def require_support(model: nn.Module) -> None:
    """Refuse a compiled model where this torch lacks what its hooks need.

    Raises:
        RuntimeError: A part of the model was compiled, and a private part of torch is missing.
    """
    missing = missing_parts() if is_compiled(model) else []
    if missing:
        raise RuntimeError(_unsupported(missing))


def _unsupported(missing: Collection[str]) -> str:
    return (
        f"torch.compile of torch {torch.__version__} is not supported by lightning-qat: it lacks "
        f"{', '.join(missing)}. Train without torch.compile."
    )


def constant_while_tracing(function: _Function) -> _Function:
    """Have dynamo call a function while it traces, and take the result for a constant.

    ``torch.compiler.assume_constant_result`` does the same and loads dynamo, 600 modules, where it
    decorates: as long again as the import of torch.
    """
    setattr(function, _CONSTANT, True)
    return function


def _marks_constants() -> bool:
    """Whether torch's decorator sets the attribute that ``constant_while_tracing`` sets."""

    def function() -> None:
        pass

    torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]
    return getattr(function, _CONSTANT, False) is True


def run_outside_graphs(codes: Collection[CodeType]) -> None:
    """Have dynamo run code of ours, and what it calls, as it is.

    Otherwise it would make graphs of it alone: of the hooks of the very module that is compiled,
    and of the function mode where a graph of the user's has broken. Within a graph they stay part
    of it. (The public decorators break the graph there.) Nothing but these code objects is changed,
    and a torch without dynamo's frame strategies is left alone.
    """
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    names = _NEEDED["torch._C._dynamo.eval_frame"]
    if all(hasattr(frames, name) for name in names):
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        for code in codes:
            frames.set_code_exec_strategy(code, skip)


def trace_hooks(model: nn.Module) -> None:
    """Have the hooks of compiled modules become part of their graphs.

    By default those of the very module that was wrapped run outside.
    """
    wrappers: list[Any] = [module for module in model.modules() if _WRAPPED in module._modules]
    for wrapper in wrappers:
        wrapper.__dict__["_initialize"] = partial(_initialize, wrapper)
        wrapper._initialize()


def trace_hooks_of_wrapped_modules(hooked: Callable[[nn.Module], bool]) -> None:
    """Have ``torch.compile(module)`` make the hooks of a module part of its graph, from now on.

    Otherwise those of the very module that is wrapped run outside it, and a graph knows nothing of
    what they keep of a forward. A second call changes nothing.

    Args:
        hooked: Whether a module has such hooks; every other one is wrapped as torch does it.
    """
    if _WATCHED:
        return

    def watch(wrapper: nn.Module, name: str, module: nn.Module | None) -> None:
        if name == _WRAPPED and module is not None and hooked(module):
            wrapper.__dict__["_initialize"] = partial(_initialize, wrapper)

    _WATCHED.append(register_module_module_registration_hook(watch))


_WATCHED: list[object] = []


def _initialize(wrapper: Any) -> None:
    import torch._dynamo

    with torch._dynamo.config.patch(wrap_top_frame=True):
        type(wrapper)._initialize(wrapper)


class FunctionsForModes:
    """Functions that dynamo hands to function modes although its own table lacks them.

    torch 2.13 keeps those back that ``torch.overrides`` does not list: hardswish, hardsigmoid, pad.
    They are in dynamo's table only while it compiles a frame for which ``wanted`` is true.

    Args:
        functions: The functions.
        wanted: Asked when dynamo begins to compile a frame.
    """

    def __init__(
        self, functions: Collection[Callable[..., Any]], wanted: Callable[[], bool]
    ) -> None:
        self._functions, self._wanted = functions, wanted
        self._added: set[Any] = set()

    def watch_compilations(self) -> None:
        """Be called when dynamo begins and ends to compile; does nothing while it is not loaded."""
        if "torch._dynamo" not in sys.modules:
            return
        handler: Any = getattr(sys.modules.get("torch._dynamo.callback"), "callback_handler", None)
        # ``torch._dynamo.reset`` forgets its callbacks.
        if handler is not None and self._end not in handler.end_callbacks:
            handler.register_start_callback(self._start)
            handler.register_end_callback(self._end)

    def add_while_compiling(self) -> None:
        """Add the functions until the compilation that runs has ended.

        Raises:
            RuntimeError: This torch lacks a private part that compiled models need.
        """
        missing = missing_parts()
        if missing:
            raise RuntimeError(_unsupported(missing))
        self.watch_compilations()
        self._add()

    def _start(self, _: object) -> None:
        if self._wanted() and not missing_parts():
            self._add()

    def _add(self) -> None:
        table = _table_of_functions()
        self._added |= set(self._functions) - table
        table |= self._added

    def _end(self, _: object) -> None:
        if self._added:
            table = _table_of_functions()
            table -= self._added
            self._added.clear()


def _table_of_functions() -> set[Any]:
    """Dynamo's own set of the functions that it hands to function modes."""
    from torch._dynamo.variables.torch import get_overridable_functions

    return get_overridable_functions()


def resumed_from(code: CodeType) -> CodeType | None:
    """The function of which a graph break has made a rest; ``None``: it is no such rest."""
    module: Any = sys.modules.get("torch._dynamo.resume_execution")
    if module is None:
        return None
    resumed = module.ContinueExecutionCache.generated_code_metadata.get(code)
    found: CodeType | None = None if resumed is None else resumed.code
    return found


class TracedFrame(NamedTuple):
    """A Python frame that dynamo traces.

    Args:
        code: Its code; for what follows a graph break, that of the whole function.
        line: The line of the file.
        place: Opcode and position of the running instruction; of what follows a graph break, too,
            where offsets in the bytecode are others.
        namespace: Its globals.
        forward_of: The module whose forward it is; ``None``: it is another function.
    """

    code: CodeType
    line: int
    place: tuple[str, Any]
    namespace: dict[str, Any]
    forward_of: nn.Module | None


def traced_frames() -> Iterator[TracedFrame]:
    """The frames that dynamo traces at this moment, innermost first."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    frame: Any = InstructionTranslator.current_tx().output.current_tx
    while frame is not None:
        # What follows a graph break has become a function of its own.
        code = resumed_from(frame.f_code) or frame.f_code
        running = frame.current_instruction
        place = running.opname, tuple(running.positions or ())
        yield TracedFrame(code, frame.lineno, place, frame.f_globals, _forward_of(frame, code))
        frame = frame.parent


def _forward_of(frame: Any, code: CodeType) -> nn.Module | None:
    """The module whose forward a frame of dynamo traces, where dynamo knows it."""
    variable = frame.symbolic_locals.get("self")
    if hasattr(variable, "realize"):
        variable = variable.realize()
    module = getattr(variable, "value", None)
    if not isinstance(module, nn.Module):
        return None
    forward = inspect.unwrap(type(module).forward)
    return module if getattr(forward, "__code__", None) is code else None
