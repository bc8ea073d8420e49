"""Where in the user's own code a call stands: its function, its place among such calls."""

from __future__ import annotations

import dis
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from types import CodeType, FrameType
from typing import Any

from torch.compiler import is_dynamo_compiling

from lightning_qat.function_hooks.code_sites import code_sites
from lightning_qat.model.attributes import HOOKS
from lightning_qat.model.torch_compile import (
    TracedFrame,
    constant_while_tracing,
    resumed_from,
    traced_frames,
)

_BY_LINE = re.compile(r"\w+@[^\[\]]+\+\d+:\d+")


def is_by_line(key: str) -> bool:
    """Whether a plan of an earlier version names a call by its line: ``add@forward+3:0``."""
    return _BY_LINE.fullmatch(key) is not None


def call_site(within: Within = None) -> str | None:
    """The place in the user's code that makes the present call, in the innermost function.

    Which functions lead there is left out, for activation checkpointing adds some in training. How
    often a module has called from there before tells two ways apart.

    Args:
        within: The run of the module that is taken to make the call; see ``running_call``.

    Returns:
        ``@forward[+#0]``: the first sum in ``forward``. ``None`` within a graph that
        ``torch.compile`` or ``torch.fx`` made, and where another module makes the call; empty: the
        module has no code of the user.
    """
    found = _innermost(within)
    if found is None or isinstance(found, str):
        return found
    return f"@{_named(found.f_code, found.f_lasti)}"


@constant_while_tracing
def traced_call_site() -> str | None:
    """``call_site`` while ``torch.compile`` traces: its own stack has the user's frames."""
    found = _innermost_traced()
    if found is None or isinstance(found, str):
        return found
    return f"@{found.code.co_name}[{code_sites(found.code).by_place.get(found.place, '')}]"


def call_chain() -> str:
    """The places in all functions through which a forward makes the present call.

    Returns:
        ``@forward[gate#1]>gate[*#0]``: the first product of the function ``gate``, which
        ``forward`` calls in a second place.
    """
    parts = [_named(frame.f_code, frame.f_lasti) for frame in _users_frames()]
    return "@" + ">".join(reversed(parts)) if parts else ""


def call_line(within: Within = None) -> str | None:
    """The line of the call in the innermost function, for plans of earlier versions.

    Returns:
        ``@forward+3``: the third line after that of ``def forward``; ``None`` and empty as
        ``call_site``.
    """
    found = _innermost(within)
    if found is None or isinstance(found, str):
        return found
    return f"@{found.f_code.co_name}+{found.f_lineno - found.f_code.co_firstlineno}"


@constant_while_tracing
def traced_call_line() -> str | None:
    """``call_line`` while ``torch.compile`` traces."""
    found = _innermost_traced()
    if found is None or isinstance(found, str):
        return found
    return f"@{found.code.co_name}+{found.line - found.code.co_firstlineno}"


def _innermost_traced() -> TracedFrame | str | None:
    """``_innermost`` while ``torch.compile`` traces, which may leave torch's call out."""
    found: TracedFrame | None = None
    for frame in traced_frames():
        if found is None and _is_users(frame.namespace):
            found = frame
        if frame.forward_of is not None:
            if HOOKS in vars(frame.forward_of):
                break
            if found is not None:
                return None
    return found or ""


def caller() -> str:
    """Name of the Python module whose code makes the present call; empty where there is none."""
    if is_dynamo_compiling():
        return _traced_caller()
    frame = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(_HANDS_ON):
            return name
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@constant_while_tracing
def _traced_caller() -> str:
    names = (str(frame.namespace.get("__name__", "")) for frame in traced_frames())
    return next((name for name in names if not name.startswith(_HANDS_ON)), "")


def is_called_by_layer() -> bool:
    """Whether a layer of torch or of this package makes the present call, and no code of a user."""
    return not is_users({"__name__": caller()})


def is_called_for_weight() -> bool:
    """Whether the present call computes a weight: weight_norm, spectral_norm, parametrizations."""
    return caller().startswith("torch.nn.utils.")


_HANDS_ON = (
    "lightning_qat.function_hooks.",
    "lightning_qat.joins.",
    "torch.overrides",
    "torch.functional",
    "torch.nn.functional",
)
"""What stands between a call and the function modes that see it."""

_CALL = "_call_impl"
"""The function of torch that calls a module's forward."""
RUNS_AGAIN = "_run_checkpointed_again"
"""The function of this package that calls a checkpointed function in backward."""


Within = FrameType | str | None
"""torch's call of a module, ``RUNS_AGAIN``, or ``None``: the innermost call of any module."""


def running_call() -> FrameType | None:
    """The frame in which torch calls the module whose hook runs now."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != _CALL:
        frame = frame.f_back  # type: ignore[assignment]
    return frame


def _innermost(within: Within) -> FrameType | str | None:
    """The user's function that makes the present call; ``None`` and empty as ``call_site``.

    What lies between it and the call of the module is another module's where torch calls one in
    between: one without hooks, because the plan knows no call of it.
    """
    frame: FrameType | None = sys._getframe(2)
    found: FrameType | None = None
    while frame is not None:
        name = frame.f_code.co_name
        if _is_users(frame.f_globals):
            found = found or frame
        elif frame is within or name == RUNS_AGAIN:
            break
        elif name == _CALL and found is not None:
            if within is not None:
                return None
            break
        frame = frame.f_back
    if found is None:
        return ""
    return None if _is_generated(found.f_code) else found


def _users_frames() -> Iterator[FrameType]:
    """The user's functions that run now, innermost first, up to the innermost forward."""
    frame: FrameType | None = sys._getframe(2)
    found = False
    while frame is not None:
        if _is_users(frame.f_globals):
            found = True
            yield frame
        elif (found and frame.f_code.co_name == _CALL) or frame.f_code.co_name == RUNS_AGAIN:
            return
        frame = frame.f_back


_MODES = frozenset(("training", "is_training", "train", "is_grad_enabled"))


def depends_on_mode() -> bool:
    """Whether a function that leads to the present call looks at the mode: it may be training's."""
    return any(_looks_at_mode(frame.f_code) for frame in _users_frames())


@constant_while_tracing
def traced_depends_on_mode() -> bool:
    """``depends_on_mode`` while ``torch.compile`` traces."""
    return any(_looks_at_mode(f.code) for f in traced_frames() if _is_users(f.namespace))


def _looks_at_mode(code: CodeType) -> bool:
    return not _MODES.isdisjoint((*code.co_names, *code.co_varnames, *code.co_freevars))


def _named(code: CodeType, offset: int) -> str:
    whole = resumed_from(code)
    if whole is None:
        return f"{code.co_name}[{code_sites(code).by_offset.get(offset, '')}]"
    # Offsets are others; the places in the file are not.
    while offset and dis.opname[code.co_code[offset]] == "CACHE":
        offset -= 2
    # Python 3.10 has no positions.
    all_positions: Any = getattr(code, "co_positions", tuple)
    positions = next(islice(all_positions(), offset // 2, None), ())
    place = dis.opname[code.co_code[offset]], tuple(positions)
    return f"{whole.co_name}[{code_sites(whole).by_place.get(place, '')}]"


def _is_generated(code: CodeType) -> bool:
    return code.co_filename.startswith("<eval_with_key>")


def _is_users(namespace: Mapping[str, Any]) -> bool:
    name = namespace.get("__name__", "")
    known = _KNOWN.get(name)
    if known is None:
        known = _KNOWN[name] = is_users(namespace)
    return known


_KNOWN: dict[str, bool] = {}
"""``is_users`` by the name of a module: it is asked some thirty times per call."""


def is_users(namespace: Mapping[str, Any]) -> bool:
    """Whether code with these globals is neither torch's nor this package's."""
    return namespace.get("__name__", "").partition(".")[0] not in ("torch", "lightning_qat")
