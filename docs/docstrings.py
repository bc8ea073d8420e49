"""How our docstrings are read for the site: ``Example:`` is a section of doctests, or of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_CODE = re.compile(r"^Example::\n\n((?: {4}.*\n?|\n)+)", flags=re.MULTILINE)


def as_sections(docstring: str) -> str:
    """The docstring with ``Example:``, and ``Example::`` before code, as a section of examples.

    Griffe takes ``Examples:`` alone for one, and any other title for prose.
    """
    fenced = _CODE.sub(
        lambda found: f"Examples:\n    ```python\n{found[1].rstrip()}\n    ```\n", docstring
    )
    return re.sub(r"^Example:$", "Examples:", fenced, flags=re.MULTILINE)


class Examples(griffe.Extension):
    """Griffe's hook: every docstring passes through ``as_sections``."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: D102
        if obj.docstring:
            obj.docstring.value = as_sections(obj.docstring.value)
