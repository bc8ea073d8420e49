"""What we change in onnxscript while a model is exported, and what is left when it is gone."""

import threading
from typing import Any

import onnx_ir as ir
import pytest
from onnxscript.rewriter.rules import common

from lightning_qat_exporters.qdq.private_onnxscript import splits_sought_at_slices

GONE = (
    "onnxscript has no slice_split_rule.try_rewrite any more: exports of large graphs take time "
    "that grows with the square of their size. See whether its rule lists all nodes still; if "
    "not, delete qdq/private_onnxscript.py."
)


def test_the_private_name_is_there() -> None:
    assert callable(getattr(getattr(common, "slice_split_rule", None), "try_rewrite", None)), GONE


def test_the_rule_sees_slices_only_and_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    rule: Any = common.slice_split_rule
    monkeypatch.setattr(rule, "try_rewrite", lambda _m, _g, node: seen.append(node.op_type))
    before = rule.try_rewrite
    with splits_sought_at_slices():
        for kind in ("Slice", "Conv"):
            rule.try_rewrite(None, None, ir.Node("", kind, []))
    assert seen == ["Slice"]
    assert rule.try_rewrite is before


def test_an_onnxscript_without_the_rule_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(common, "slice_split_rule")
    with splits_sought_at_slices():
        assert not hasattr(common, "slice_split_rule")


def test_a_second_thread_waits_and_the_rule_is_itself_in_the_end() -> None:
    rule: Any = common.slice_split_rule
    before, order, inside = rule.try_rewrite, [], threading.Event()

    def second() -> None:
        inside.wait()
        with splits_sought_at_slices():
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with splits_sought_at_slices():
        inside.set()
        thread.join(timeout=0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert rule.try_rewrite == before
