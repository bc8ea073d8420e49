"""Where in the user's own code a call stands: its function and the line in it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lightning_qat.model.torch_compile import constant_while_tracing, traced_frames


def line_of_call() -> str | None:
    """The line of the innermost frame outside torch and this package, from its function on.

    Returns:
        ``@forward+3``: the third line after that of ``def forward``. ``None`` within a graph that
        ``torch.compile`` or ``torch.fx`` made; empty: there is no such frame.
    """
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in _IS_USERS:
            _IS_USERS[name] = is_users(frame.f_globals)
        if _IS_USERS[name]:
            code = frame.f_code
            if code.co_filename.startswith("<eval_with_key>"):
                return None
            return f"@{code.co_name}+{frame.f_lineno - code.co_firstlineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


_IS_USERS: dict[str, bool] = {}
"""``is_users`` by the name of a module: it is asked some thirty times per call."""


@constant_while_tracing
def traced_line_of_call() -> str:
    """``line_of_call`` while ``torch.compile`` traces: its own stack has the user's frames."""
    for frame in traced_frames():
        if is_users(frame.namespace):
            return f"@{frame.code.co_name}+{frame.line - frame.code.co_firstlineno}"
    return ""


def is_users(namespace: Mapping[str, Any]) -> bool:
    """Whether code with these globals is neither torch's nor this package's."""
    return namespace.get("__name__", "").partition(".")[0] not in ("torch", "lightning_qat")
