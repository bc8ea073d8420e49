"""Private names of torch.onnx and onnxscript that we change, with what breaks without them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.rules import common
from torch.export import ExportedProgram

from lightning_qat_exporters.qdq.decompose import decomposed

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


@contextmanager
def decomposing_in_place() -> Iterator[None]:
    """Let torch.onnx replace the operators that ONNX does not know, and trace no others.

    A torch without ``_fx_passes.decompose_with_registry`` is left as it is: exports then take two
    to four times as long, and files are the same.
    """
    try:
        from torch.onnx._internal.exporter import _decomp, _fx_passes
    except ImportError:
        yield
        return
    passes: Any = _fx_passes
    known: Any = getattr(_decomp, "get_onnx_implemented_overloads", None)
    friendly: Any = getattr(_decomp, "create_onnx_friendly_decomposition_table", None)
    whole = getattr(passes, "decompose_with_registry", None)
    if None in (known, friendly, whole):
        yield
        return

    def decompose(program: ExportedProgram, registry: Any) -> ExportedProgram:
        has_translation = set(known(registry))
        return decomposed(program, friendly(has_translation), has_translation)

    with _LOCK:
        passes.decompose_with_registry = decompose
        try:
            yield
        finally:
            passes.decompose_with_registry = whole
