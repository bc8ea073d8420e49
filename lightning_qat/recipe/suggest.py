"""The known names that are closest to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest_names(word: str, known: Iterable[str]) -> str:
    """``closest names: 'a', 'b'``, or the known names when none is close."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return "closest names: " + ", ".join(repr(n) for n in near)
    shown = ", ".join(repr(n) for n in known[:5]) + (", ..." if len(known) > 5 else "")
    return f"known names: {shown or 'none'}"
