"""Bring an ONNX model to an older opset, which ``onnx.version_converter`` mostly cannot do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from lightning_qat.export.protocol import (
    Array,
    CannotExpress,
    Unsupported,
    UnsupportedByTarget,
)
from lightning_qat_exporters.cann.qdq_graph.constants import constant
from lightning_qat_exporters.cann.qdq_graph.types import TARGET
from lightning_qat_exporters.onnx_files.graph_writer import GraphWriter, initializer

OPSETS = range(11, 19)
"""Opsets that CANN's parsers take; 11 is the one that all of them take and AMCT writes."""

_VARIADIC = onnx.defs.OpSchema.FormalParameterOption.Variadic


class Downgrade(ir.passes.InPlacePass):
    """Bring a model to an older opset of the default domain.

    ``onnx.version_converter`` has no way down for most operators that changed (ReduceMean 18 to
    13, for one). The rule here: where the operator's schema is the same but for types, it stays;
    an attribute or input that the old schema lacks must be at its default; operators with a known
    older spelling get it, all else is refused. Integer layers and Ascend's operators are left
    alone.
    """

    def __init__(self, opset: int) -> None:
        """Remember the wanted opset."""
        super().__init__()
        self.opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place.

        Raises:
            UnsupportedByTarget: Nodes have no form at the opset; each is named with the lowest
                opset that has one.
        """
        source = model.graph.opset_imports.get("", self.opset)
        target = min(self.opset, source)
        model.ir_version = onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", target]
        for node in model.graph.all_nodes():
            node.version = None
        if target < source:
            problems = _lowered(model.clone(), source, target)
            if problems:
                lowest = _with_lowest_opset(model, source, target, problems)
                raise UnsupportedByTarget(TARGET, lowest)
            _lowered(model, source, target)
            model.graph.opset_imports[""] = target
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
        try:
            for op_types, since, adapt in _ADAPTERS:
                if node.op_type in op_types and target < since:
                    adapt(node, target)
            if node.graph is not None:
                _require_same_meaning(node, source, target)
        except CannotExpress as error:
            reason = f"{node.op_type} {error.reason}"
            problems[position] = Unsupported(node.name or node.op_type, reason)
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
        if value.dtype is not None and _type_name(value.dtype) not in formal.types:
            raise CannotExpress(
                f"does not take {value.dtype.name} for its input {formal.name!r} yet"
            )


def _default(schema: onnx.defs.OpSchema, name: str) -> Any:
    proto = schema.attributes[name].default_value
    if proto is None or not proto.name:
        return None
    value = onnx.helper.get_attribute_value(proto)
    return value.decode() if isinstance(value, bytes) else value


def _type_name(dtype: ir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"


def _axes_to_attribute(node: ir.Node, target: int) -> None:
    """Reduce*, Squeeze, Unsqueeze: the input ``axes`` was an attribute."""
    if node.attributes.get_int("noop_with_empty_axes", 0) and len(node.inputs) < 2:
        raise CannotExpress("has no attribute 'noop_with_empty_axes' yet")
    node.attributes.pop("noop_with_empty_axes", None)
    _input_to_attribute(node, "axes")


def _input_to_attribute(node: ir.Node, name: str) -> None:
    if len(node.inputs) > 1:
        if node.inputs[1] is not None:
            numbers = constant(node.inputs[1])
            if numbers is None:
                raise CannotExpress(f"takes {name!r} as a computed input")
            values = [int(n) for n in numbers.reshape(-1)]
            node.attributes[name] = ir.AttrInt64s(name, values)
        node.resize_inputs(1)


def _split(node: ir.Node, target: int) -> None:
    """Split: a number of parts was sizes of parts, an attribute before opset 13.

    ``num_outputs`` parts have ``ceil(size / num_outputs)`` elements, the last one the rest.
    """
    parts = node.attributes.get_int("num_outputs", 0)
    if parts:
        shape = _shape(node)
        size = None if shape is None else shape[node.attributes.get_int("axis", 0)]
        if not isinstance(size, int):
            raise CannotExpress(f"needs the size of the dimension to split it into {parts}")
        most = -(-size // parts)
        sizes = [most] * (parts - 1) + [size - most * (parts - 1)]
        del node.attributes["num_outputs"]
        node.resize_inputs(2)
        node.replace_input_with(1, _Expansion(node).constant("split", np.array(sizes, np.int64)))
    if target < 13:
        _input_to_attribute(node, "split")


def _softmax(node: ir.Node, target: int) -> None:
    """Softmax, LogSoftmax, Hardmax: all axes from ``axis`` on were one; only the last is alike."""
    shape = _shape(node)
    axis = node.attributes.get_int("axis", -1)
    if axis == -1 or (shape is not None and axis == len(shape) - 1):
        node.attributes["axis"] = ir.AttrInt64("axis", axis)
        return
    if shape is None:
        raise CannotExpress(f"needs the rank of its input to work along axis {axis}")
    perm = list(range(len(shape)))
    perm[axis], perm[-1] = perm[-1], perm[axis]
    write = _Expansion(node)
    value = write("Transpose", node.inputs[0], perm=perm)
    write.finish("Transpose", write(node.op_type, value, axis=-1), perm=perm)


def _resize(node: ir.Node, target: int) -> None:
    """Resize: ``roi`` and ``scales`` had to be there, empty where unused."""
    empty = _Expansion(node).constant("empty", np.zeros(0, np.float32))
    node.resize_inputs(max(len(node.inputs), 3))
    for index in (1, 2):
        if node.inputs[index] is None:
            node.replace_input_with(index, empty)


def _reshape(node: ir.Node, target: int) -> None:
    """Reshape: a 0 means "as it was"; a computed shape has one only for empty tensors."""
    shape = constant(node.inputs[1])
    if node.attributes.get_int("allowzero", 0) and shape is not None and 0 in shape:
        raise CannotExpress("makes a dimension of 0 (allowzero = 1)")
    node.attributes.pop("allowzero", None)


def _shape_slice(node: ir.Node, target: int) -> None:
    """Shape: a part of a shape is Shape and Slice."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    node.attributes.pop("start", None)
    node.attributes.pop("end", None)
    if start or end is not None:
        write = _Expansion(node)
        last = np.iinfo(np.int64).max if end is None else end
        first_value = write.constant("start", np.array([start], np.int64))
        last_value = write.constant("end", np.array([last], np.int64))
        whole = write("Shape", node.inputs[0], dtype=ir.DataType.INT64)
        write.finish("Slice", whole, first_value, last_value)


def _pad(node: ir.Node, target: int) -> None:
    """Pad: amounts for some axes are amounts for all axes."""
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return
    amounts, axes, shape = constant(node.inputs[1]), constant(node.inputs[3]), _shape(node)
    if amounts is None or axes is None or shape is None:
        raise CannotExpress("pads axes that are not all known")
    full = np.zeros((2, len(shape)), np.int64)
    full[:, axes] = amounts.reshape(2, -1)
    node.replace_input_with(1, _Expansion(node).constant("pads", full.reshape(-1)))
    node.resize_inputs(3)


def _roi_align(node: ir.Node, target: int) -> None:
    """RoiAlign: coordinates were shifted by half a pixel."""
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if mode != "output_half_pixel":
        raise CannotExpress(f"has no coordinate_transformation_mode {mode!r} yet")
    node.attributes.pop("coordinate_transformation_mode")


def _grid_sample(node: ir.Node, target: int) -> None:
    """GridSample: the modes had the names of their two-dimensional forms."""
    mode = node.attributes.get_string("mode", "linear")
    older = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    node.attributes["mode"] = ir.AttrString("mode", older)


def _layer_normalization(node: ir.Node, target: int) -> None:
    """LayerNormalization: ``(x - mean) / sqrt(var + epsilon) * scale + bias``."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise CannotExpress("gives its mean and deviation, too")
    shape, axis = _shape(node), node.attributes.get_int("axis", -1)
    if axis >= 0 and shape is None:
        raise CannotExpress(f"needs the rank of its input to work from axis {axis} on")
    axes = list(range(axis - len(shape) if shape is not None and axis >= 0 else axis, 0))
    write = _Expansion(node)
    x, weight, *rest = node.inputs
    epsilon = write.constant("epsilon", np.float32(node.attributes.get_float("epsilon", 1e-5)))
    centred = write("Sub", x, write("ReduceMean", x, axes=axes, keepdims=1))
    square = write("Mul", centred, centred)
    variance = write("ReduceMean", square, axes=axes, keepdims=1)
    deviation = write("Sqrt", write("Add", variance, epsilon))
    normal = write("Div", centred, deviation)
    if rest and rest[0] is not None:
        write.finish("Add", write("Mul", normal, weight), rest[0])
    else:
        write.finish("Mul", normal, weight)


def _hard_swish(node: ir.Node, target: int) -> None:
    """HardSwish: ``x * max(0, min(1, x / 6 + 0.5))``."""
    write, x = _Expansion(node), node.inputs[0]
    write.finish("Mul", x, write("HardSigmoid", x, alpha=1 / 6, beta=0.5))


def _gelu(node: ir.Node, target: int) -> None:
    """Gelu: ``x * (erf(x / sqrt(2)) + 1) / 2``, or its approximation by tanh."""
    write, x = _Expansion(node), node.inputs[0]
    one = write.constant("one", np.float32(1))
    if node.attributes.get_string("approximate", "none") == "tanh":
        cubic = write.constant("cubic", np.float32(0.044715))
        slope = write.constant("slope", np.float32(np.sqrt(2 / np.pi)))
        cube = write("Mul", write("Mul", write("Mul", x, x), x), cubic)
        inner = write("Tanh", write("Mul", write("Add", x, cube), slope))
    else:
        inner = write("Erf", write("Mul", x, write.constant("slope", np.float32(np.sqrt(0.5)))))
    scaled = write("Mul", x, write.constant("half", np.float32(0.5)))
    write.finish("Mul", scaled, write("Add", inner, one))


def _not_strict(node: ir.Node, target: int) -> None:
    """GreaterOrEqual, LessOrEqual: the strict comparison, or equal."""
    write, boolean = _Expansion(node), ir.DataType.BOOL
    strict = write(node.op_type.removesuffix("OrEqual"), *node.inputs, dtype=boolean)
    write.finish("Or", strict, write("Equal", *node.inputs, dtype=boolean))


_ADAPTERS: Sequence[tuple[Iterable[str], int, Callable[[ir.Node, int], None]]] = (
    (
        (
            *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"),
            *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare"),
        ),
        18,
        _axes_to_attribute,
    ),
    (("ReduceSum", "Squeeze", "Unsqueeze"), 13, _axes_to_attribute),
    (("Split",), 18, _split),
    (("Softmax", "LogSoftmax", "Hardmax"), 13, _softmax),
    (("Resize",), 13, _resize),
    (("Reshape",), 14, _reshape),
    (("Shape",), 15, _shape_slice),
    (("Pad",), 18, _pad),
    (("RoiAlign",), 16, _roi_align),
    (("GridSample",), 20, _grid_sample),
    (("LayerNormalization",), 17, _layer_normalization),
    (("HardSwish",), 14, _hard_swish),
    (("Gelu",), 20, _gelu),
    (("GreaterOrEqual", "LessOrEqual"), 12, _not_strict),
)
"""Operators, the opset from which on they need no change, and how they change below it."""


def _shape(node: ir.Node) -> Sequence[Any] | None:
    value = node.inputs[0]
    return None if value is None or value.shape is None else tuple(value.shape)


class _Expansion:
    """Writes the nodes that replace one node, named after it."""

    def __init__(self, node: ir.Node) -> None:
        assert isinstance(node.graph, ir.Graph)  # functions are inlined before
        self._node, self._writer, self._count = node, GraphWriter(node.graph), 0
        self._name = node.name or node.outputs[0].name or node.op_type

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Insert a node before the replaced one; its type is the replaced input's unless given."""
        self._count += 1
        name = f"{self._name}.{self._count}"
        first = self._node.inputs[0]
        kind = dtype if dtype is not None or first is None else first.dtype
        output = ir.Value(name=f"{name}.output0", type=ir.TensorType(kind) if kind else None)
        return self._insert(op_type, inputs, attributes, name, output)

    def constant(self, key: str, array: Array | np.generic) -> ir.Value:
        """A small initializer of the node's graph."""
        return initializer(self._writer.graph, f"{self._name}.{key}", np.asarray(array))

    def finish(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> None:
        """Insert the last node; it takes the replaced node's output, name and place."""
        old = self._node.outputs[0]
        output = ir.Value(name=old.name, type=old.type, shape=old.shape)
        self._insert(op_type, inputs, attributes, self._name, output)
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        self._writer.graph.remove(self._node, safe=True)

    def _insert(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        name: str,
        output: ir.Value,
    ) -> ir.Value:
        return self._writer.insert(self._node, op_type, inputs, attributes, name, output=output)
