"""LiteRT's schema, reading no more of a file than it holds.

flatbuffers' Python code follows whatever a file says: a vector of four billion tables in a file of
a kilobyte, or one vector that every table refers to, takes hours. Here each file has a budget of
elements in proportion to its size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace
from typing import Any

_PER_BYTE, _AT_LEAST = 4, 4096
"""Elements of vectors that may be read: a table of a vector takes eight bytes or more."""

_left = threading.local()


@contextmanager
def budget(size: int) -> Iterator[None]:
    """Within it, a file of so many bytes is read.

    Raises:
        ValueError: It claims more than it holds, from within.
    """
    _left.elements = _PER_BYTE * size + _AT_LEAST
    try:
        yield
    finally:
        del _left.elements


@cache
def bounded_schema() -> Any:
    """A copy of LiteRT's schema whose tables count what they read.

    Imported when it is needed, because ai-edge-litert is an optional dependency.
    """
    import flatbuffers

    spec = find_spec("ai_edge_litert.schema_py_generated")
    if spec is None or spec.loader is None:
        raise ImportError("No module named 'ai_edge_litert.schema_py_generated'")
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)

    class Table(flatbuffers.table.Table):  # type: ignore[misc]  # flatbuffers ships no types
        def VectorLen(self, off: int) -> int:  # noqa: N802  # flatbuffers' name
            return _spent(super().VectorLen(off))

        def String(self, off: int) -> bytes:  # noqa: N802
            text: bytes = super().String(off)
            _spent(len(text))
            return text

    tables = SimpleNamespace(**vars(flatbuffers.table) | {"Table": Table})
    module.flatbuffers = SimpleNamespace(**vars(flatbuffers) | {"table": tables})
    return module


def _spent(elements: int) -> int:
    left = getattr(_left, "elements", None)
    if left is not None:
        _left.elements = left - elements - 1
        if _left.elements < 0:
            raise ValueError("it claims to hold more than it does")
    return elements
