"""What must hold of a deploy model before it is run: Ascend's operators, windows, what is computed.

The rules of ONNX's own operators are those of onnx's checker, which every file has passed before.
``lint`` says what a device wants; here is what a node needs to have a meaning at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

_FLOAT, _INT, _STRING = AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.STRING


class _Operator(NamedTuple):
    """An operator of Ascend: the number of inputs that must be there, of all, and attributes."""

    required: int
    inputs: int
    attributes: Mapping[str, int]
    needed: tuple[str, ...] = ()


_RNN: Mapping[str, int] = {
    "hidden_size": _INT,
    "direction": _STRING,
    "clip": _FLOAT,
    "input_forget": _INT,
    "linear_before_reset": _INT,
    "activations": AttributeProto.STRINGS,
    "activation_alpha": AttributeProto.FLOATS,
    "activation_beta": AttributeProto.FLOATS,
    "quant_dtype": _INT,
    **{f"quant_{what}_{of}": _FLOAT for what in ("scale", "offset") for of in "xh"},
    **{f"quant_sqrt_mode_{of}": _INT for of in "xh"},
}
_RNN_NEEDED = (
    "hidden_size",
    *(f"quant_{what}_{of}" for what in ("scale", "offset") for of in "xh"),
)
_SCALED: Mapping[str, int] = {
    "scale": _FLOAT,
    "offset": _FLOAT,
    "sqrt_mode": _INT,
    "dst_type": _STRING,
}
_OPERATORS: Mapping[str, _Operator] = {
    "AscendQuant": _Operator(1, 1, {**_SCALED, "round_mode": _STRING}, ("scale",)),
    "AscendAntiQuant": _Operator(1, 1, {**_SCALED, "dtype": _INT}, ("scale",)),
    "AscendDequant": _Operator(2, 2, {"sqrt_mode": _INT, "relu_flag": _INT, "dtype": _INT}),
    "BasicLSTMInplaceFillWindowCache": _Operator(5, 9, _RNN, _RNN_NEEDED),
    "BasicGRUInplaceFillWindowCache": _Operator(4, 8, _RNN, _RNN_NEEDED),
}
_AT_LEAST_ONE = ("strides", "dilations", "kernel_shape", "group", "hidden_size")
_REPEATING = ("Scan", "SequenceMap")
_WORDS: Mapping[int, str] = {
    _FLOAT: "a number",
    _INT: "an integer",
    _STRING: "a word",
    AttributeProto.STRINGS: "words",
    AttributeProto.FLOATS: "numbers",
}


def check_deploy(model: ModelProto) -> None:
    """Check the nodes of a deploy model, in branches as well.

    Raises:
        ValueError: An operator is unknown or repeats itself without a bound, or one of Ascend's
            lacks inputs or attributes, or has others than it takes; all are named.
    """
    problems = [
        f"{node.name or next(iter(node.output), '')!r} ({node.op_type}): {problem}"
        for node in _nodes(model.graph)
        for problem in _problems(node)
    ]
    if problems:
        shown = [*problems[:20], *([f"and {len(problems) - 20} more"] if problems[20:] else [])]
        raise ValueError("A deploy model cannot be run so:" + "".join(f"\n  {p}" for p in shown))


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    waiting = [graph]
    while waiting:
        for node in waiting.pop().node:
            yield node
            waiting += [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]


def _problems(node: NodeProto) -> Iterator[str]:
    if node.op_type in _REPEATING:
        yield "it repeats its body; CANN has no plugin for it either"
    operator = _OPERATORS.get(node.op_type)
    own_domain = node.domain in ("", "ai.onnx")
    if operator is None and (not own_domain or not onnx.defs.has(node.op_type)):
        yield f"there must be such an operator; the domain is {node.domain!r}"
    for attribute in node.attribute:
        if attribute.name in _AT_LEAST_ONE:
            values = attribute.ints if attribute.type == AttributeProto.INTS else [attribute.i]
            if any(value < 1 for value in values):
                yield f"{attribute.name} must be 1 or more; got {list(values)}"
    if operator is None:
        return
    given = [name != "" for name in node.input]
    if len(given) > operator.inputs or sum(given[: operator.required]) < operator.required:
        yield (
            f"it must have {operator.required} to {operator.inputs} inputs; got {list(node.input)}"
        )
    if operator.inputs > 2 and len(given) != operator.inputs:
        yield f"it must have {operator.inputs} inputs, empty where left out; got {len(given)}"
    yield from _attribute_problems(node, operator)


def _attribute_problems(node: NodeProto, operator: _Operator) -> Iterator[str]:
    names = [attribute.name for attribute in node.attribute]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"the attribute {name!r} must be there once"
    for name in operator.needed:
        if name not in names:
            yield f"it must have the attribute {name!r}"
    for attribute in node.attribute:
        kind = operator.attributes.get(attribute.name)
        if kind is None:
            yield f"it takes no attribute {attribute.name!r}"
        elif attribute.type != kind:
            yield f"the attribute {attribute.name!r} must be {_WORDS[kind]}"
        elif kind == _FLOAT:
            yield from _number_problems(attribute.name, attribute.f)
        elif kind == _INT and attribute.name.partition("_")[0] in ("sqrt", "relu"):
            if attribute.i not in (0, 1):
                yield f"{attribute.name} must be 0 or 1; got {attribute.i}"


_MUST: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "scale": ("a finite number other than 0", lambda value: value != 0),
    "offset": ("a whole number of 16 bits", lambda v: v == int(v) and abs(v) <= 2**16),
}


def _number_problems(name: str, value: float) -> Iterator[str]:
    kind = next((kind for kind in _MUST if kind in name), None)
    must, holds = _MUST[kind] if kind else ("finite", lambda _: True)
    if not math.isfinite(value) or not holds(value):
        yield f"{name} must be {must}; got {value!r}"
