"""Whether the code that makes the planned calls is still the code that the plan was made for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from types import CodeType

from torch import nn

from lightning_qat.function_hooks.code_sites import code_sites

Code = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Module path to function to what it calls to the number of places that do."""

_SITE = re.compile(r"[@>](<?\w+>?)\[([^\]]*)#\d+\]")


def code_of(modules: Mapping[str, nn.Module], chains: Mapping[str, Iterable[str]]) -> Code:
    """How many places of each function could make calls like the planned ones.

    Args:
        modules: Path to module.
        chains: Module path to functions through which it makes calls: ``@forward[+#0]``.

    Returns:
        ``{"block": {"forward": {"+": 1}}}``: one place adds in the forward of ``block``. Functions
        that are found neither in a module's class nor beside it are left out.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    for path, found_there in chains.items():
        for chain in found_there:
            for function, called in _SITE.findall(chain):
                code = _code(modules[path], function) if path in modules else None
                if code is not None:
                    counts = found.setdefault(path, {}).setdefault(function, {})
                    counts[called] = code_sites(code).counts.get(called, 0)
    return found


def code_problem(modules: Mapping[str, nn.Module], planned: Code) -> str | None:
    """A message that names every call that is new or gone; ``None``: the code is the plan's."""
    differences = []
    for path, functions in planned.items():
        for function, counts in functions.items():
            code = _code(modules[path], function) if path in modules else None
            if code is None:
                continue
            now = code_sites(code).counts
            for called, before in counts.items():
                more = now.get(called, 0) - before
                if more:
                    kind = f"{more} new" if more > 0 else f"{-more} gone"
                    differences.append(
                        f"{function} of {path or type(modules[path]).__name__!r} calls {called!r} "
                        f"in {now.get(called, 0)} places, not in {before} ({kind})"
                    )
    if not differences:
        return None
    return (
        "The forward must be the one that the checkpoint was trained with, for its plan says which "
        f"calls are quantized: {'; '.join(differences)}. Layout and comments do not count. Load it "
        "into the code that was trained, or load the float weights alone, "
        "strip_quantizers(checkpoint), and train anew."
    )


def _code(module: nn.Module, function: str) -> CodeType | None:
    """The code of a method of a module, or of a function of the file that its forward is in."""
    forward = inspect.unwrap(type(module).forward)
    candidates = [
        getattr(type(module), function, None),
        getattr(forward, "__globals__", {}).get(function),
    ]
    for candidate in candidates:
        code = getattr(inspect.unwrap(candidate), "__code__", None) if candidate else None
        if isinstance(code, CodeType) and code.co_name == function:
            return code
    return None
