"""Where in the user's own code a call stands: its function and the line in it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch


def line_of_call() -> str | None:
    """The line of the innermost frame outside torch and this package, from its function on.

    ``None`` within a graph that ``torch.compile`` or ``torch.fx`` made; empty: there is no frame.
    """
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in _USERS:
            _USERS[name] = is_users(frame.f_globals)
        if _USERS[name]:
            code = frame.f_code
            if code.co_filename.startswith("<eval_with_key>"):
                return None
            return f"@{code.co_name}+{frame.f_lineno - code.co_firstlineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


_USERS: dict[str, bool] = {}
"""``is_users`` by the name of a module: it is asked some thirty times per call."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def traced_line_of_call() -> str:
    """``line_of_call`` while ``torch.compile`` traces: its own stack has the user's frames."""
    from torch._dynamo.resume_execution import ContinueExecutionCache
    from torch._dynamo.symbolic_convert import InstructionTranslator

    frame: Any = InstructionTranslator.current_tx().output.current_tx
    while frame is not None:
        if is_users(frame.f_globals):
            code = frame.f_code
            # What follows a graph break has become a function of its own.
            resumed = ContinueExecutionCache.generated_code_metadata.get(code)
            code = code if resumed is None else resumed.code
            return f"@{code.co_name}+{frame.lineno - code.co_firstlineno}"
        frame = frame.parent
    return ""


def is_users(namespace: Mapping[str, Any]) -> bool:
    """Whether code with these globals is neither torch's nor this package's."""
    return namespace.get("__name__", "").partition(".")[0] not in ("torch", "lightning_qat")
