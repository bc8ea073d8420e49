"""Private names of onnxscript that we change, one function each, with what breaks without them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.rules import common

_LOCK = threading.RLock()


@contextmanager
def splits_sought_at_slices() -> Iterator[None]:
    """Let onnxscript's rule that makes Split of two Slices look at Slices only.

    For every node of a graph the rule lists all of them first, whatever the node is: time that
    grows with the square of a graph's size. The rule is one object for the whole process, so one
    thread at a time is inside; others wait. An onnxscript without ``slice_split_rule.try_rewrite``
    is left as it is: large graphs then take longer, and files are the same.
    """
    rule: Any = getattr(common, "slice_split_rule", None)
    with _LOCK:
        attempt = getattr(rule, "try_rewrite", None)
        if attempt is None:
            yield
            return

        def at_slices(model: Any, graph_or_function: Any, node: ir.Node, **options: Any) -> Any:
            if node.op_type != "Slice":
                return None
            return attempt(model, graph_or_function, node, **options)

        rule.try_rewrite = at_slices
        try:
            yield
        finally:
            rule.try_rewrite = attempt
