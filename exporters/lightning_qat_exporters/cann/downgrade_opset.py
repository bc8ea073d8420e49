"""Bring an ONNX model to an older opset, which ``onnx.version_converter`` mostly cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from lightning_qat.export.protocol import CannotExpress, Unsupported, UnsupportedByTarget
from lightning_qat_exporters.cann.older_operators import ADAPTERS
from lightning_qat_exporters.cann.qdq_graph.names import place_of
from lightning_qat_exporters.cann.qdq_graph.types import TARGET

OPSETS = range(11, 19)
"""Opsets that CANN's parsers take; 11 is the one that all of them take and AMCT writes.

Ascend's own operators are registered up to 22 in current sources, Conv and MatMul up to 18.
"""

_PARSED_BY = (
    (13, "every CANN version parses it"),
    (16, "CANN parses it from version 8.0 on"),
    (OPSETS[-1], "current CANN parses it, version 8.0 does not"),
)
"""The last opset of a kind, and which versions parse it."""

_VARIADIC = onnx.defs.OpSchema.FormalParameterOption.Variadic


class Downgrade(ir.passes.InPlacePass):
    """Bring a model to an older opset of the default domain.

    ``onnx.version_converter`` has no way down for most operators that changed (ReduceMean 18 to
    13, for one). The rule here: where the operator's schema is the same but for types, it stays;
    an attribute or input that the old schema lacks must be at its default; operators with a known
    older spelling get it, all else is refused. Integer layers and Ascend's operators are left
    alone.
    """

    def __init__(self, opset: int | None) -> None:
        """Remember the wanted opset; ``None``: the lowest of ``OPSETS`` that expresses the model.

        What made the lowest one higher than the first of ``OPSETS`` is then in ``needed_by``.
        """
        super().__init__()
        self.opset = opset
        self.needed_by: tuple[Unsupported, ...] = ()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place.

        Raises:
            UnsupportedByTarget: Nodes have no form at the opset; each is named with the lowest
                opset that has one.
        """
        wanted = OPSETS[0] if self.opset is None else self.opset
        source = model.graph.opset_imports.get("", wanted)
        for node in model.graph.all_nodes():
            node.version = None
        target, problems = min(wanted, source), dict[int, Unsupported]()
        while target < source:
            problems = _lowered(model.clone(), source, target)
            if not problems or self.opset is not None or target == OPSETS[-1]:
                break
            self.needed_by = tuple(problems.values())
            target += 1
        if target < source:
            if problems:
                lowest = _with_lowest_opset(model, source, target, problems)
                raise UnsupportedByTarget(TARGET, lowest)
            _lowered(model, source, target)
            model.graph.opset_imports[""] = target
        model.ir_version = onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", target]
        common.RemoveUnusedOpsetsPass()(model)
        return ir.passes.PassResult(model, modified=target < source)


def _lowered(model: ir.Model, source: int, target: int) -> dict[int, Unsupported]:
    """Lower every node of ``model``; return what is impossible, by the node's position."""
    problems = {}
    for position, node in enumerate(tuple(model.graph.all_nodes())):
        before = [v.producer() for v in node.inputs[:1] if v is not None]
        if node.domain or node.op_type.startswith(("Ascend", "Basic")):
            continue
        if any(n is not None and n.op_type == "AscendQuant" for n in before):
            continue
        place = place_of(node)
        try:
            for op_types, since, adapt in ADAPTERS:
                if node.op_type in op_types and target < since:
                    adapt(node, target)
            if node.graph is not None:
                _require_same_meaning(node, source, target)
        except CannotExpress as error:
            reason = f"{node.op_type} {error.reason}"
            problems[position] = Unsupported(place, reason)
    return problems


def _with_lowest_opset(
    model: ir.Model, source: int, target: int, problems: dict[int, Unsupported]
) -> list[Unsupported]:
    lowest: dict[int, int] = {}
    for opset in range(target + 1, source + 1):
        still = _lowered(model.clone(), source, opset) if opset < source else {}
        for position in problems.keys() - still.keys():
            lowest.setdefault(position, opset)
    return [
        Unsupported(
            problem.layer,
            f"{problem.reason}; opset {target} cannot express it, the lowest opset that can is "
            f"{lowest[position]}",
            f"Ask for opset {lowest[position]}, or use another operator"
            if lowest[position] in OPSETS
            else "Use another operator",
        )
        for position, problem in problems.items()
    ]


def opset_note(opset: int, needed_by: Sequence[Unsupported]) -> str:
    """Say why a file is above the opset that every CANN version parses, and which parse it."""
    first, others = needed_by[0], len({problem.layer for problem in needed_by}) - 1
    more = f" and {others} more" if others else ""
    parsed = next((words for last, words in _PARSED_BY if opset <= last), _PARSED_BY[-1][1])
    return (
        f"the deploy model is at opset {opset}, the lowest that expresses {first.layer!r}{more} "
        f"({first.reason} at opset {opset - 1}); {parsed}"
    )


def _require_same_meaning(node: ir.Node, source: int, target: int) -> None:
    """Check one node against the older schema; drop attributes that say the default."""
    try:
        new = onnx.defs.get_schema(node.op_type, target)
    except onnx.defs.SchemaError:
        raise CannotExpress("does not exist yet") from None
    old = onnx.defs.get_schema(node.op_type, source)
    if new.since_version == old.since_version:
        return
    for name in list(node.attributes):
        if name not in new.attributes:
            if node.attributes[name].value != _default(old, name):
                raise CannotExpress(f"has no attribute {name!r} yet")
            del node.attributes[name]
    for name in old.attributes:
        unsaid = name in new.attributes and name not in node.attributes
        if unsaid and _default(old, name) != _default(new, name):
            raise CannotExpress(f"has another default for {name!r}")
    variadic = new.inputs and new.inputs[-1].option == _VARIADIC
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        if index >= len(new.inputs) and not variadic:
            raise CannotExpress(f"has no input {old.inputs[index].name!r} yet")
        formal = new.inputs[min(index, len(new.inputs) - 1)]
        if value.dtype is not None and _type_name(value.dtype) not in _types(new, formal):
            raise CannotExpress(
                f"does not take {value.dtype.name} for its input {formal.name!r} yet"
            )


def _types(schema: onnx.defs.OpSchema, formal: onnx.defs.OpSchema.FormalParameter) -> set[str]:
    """The types of an input; onnx 1.20 raises a TypeError for ``formal.types``."""
    for constraint in schema.type_constraints:
        if constraint.type_param_str == formal.type_str:
            return set(constraint.allowed_type_strs)
    return {formal.type_str}


def _default(schema: onnx.defs.OpSchema, name: str) -> Any:
    proto = schema.attributes[name].default_value
    if proto is None or not proto.name:
        return None
    value = onnx.helper.get_attribute_value(proto)
    return value.decode() if isinstance(value, bytes) else value


def _type_name(dtype: ir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"
