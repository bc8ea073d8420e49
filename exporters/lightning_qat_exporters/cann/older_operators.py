"""Operators in the spelling of older opsets, one function each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array, CannotExpress
from lightning_qat_exporters.cann.qdq_graph.constants import constant
from lightning_qat_exporters.onnx_files.graph_writer import GraphWriter, initializer

ANY = 1 << 10
"""Above every opset."""


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
        axis = node.attributes.get_int("axis", 0)
        shape = _shape(node, axis)
        size = None if shape is None else shape[axis]
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
    axis = node.attributes.get_int("axis", -1)
    shape = _shape(node, axis)
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
    amounts, axes = constant(node.inputs[1]), constant(node.inputs[3])
    shape = None if axes is None else _shape(node, *axes.reshape(-1).tolist())
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
    axis = node.attributes.get_int("axis", -1)
    shape = _shape(node, axis)
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


def _integer_extreme(node: ir.Node, target: int) -> None:
    """Max, Min of integers: the first where it is the greater, or the less, else the second."""
    if node.inputs[0] is None or not _is_integer(node.inputs[0]) or len(node.inputs) < 2:
        return
    write, compare = _Expansion(node), "Greater" if node.op_type == "Max" else "Less"
    best, *others = node.inputs
    for other in others[:-1]:
        wins = write(compare, best, other, dtype=ir.DataType.BOOL)
        best = write("Where", wins, best, other, dtype=node.inputs[0].dtype)
    wins = write(compare, best, others[-1], dtype=ir.DataType.BOOL)
    write.finish("Where", wins, best, others[-1])


def _cast_like(node: ir.Node, target: int) -> None:
    """CastLike: Cast to the type of the other tensor, where it is known."""
    like = node.inputs[1]
    if like is None or like.dtype is None:
        raise CannotExpress("needs the type of its second input to be a Cast")
    _Expansion(node).finish("Cast", node.inputs[0], to=int(like.dtype))


def _never(node: ir.Node, target: int) -> None:
    """IsNaN, IsInf of integers, which no opset takes: no integer differs from itself."""
    x = node.inputs[0]
    if x is not None and _is_integer(x):
        write = _Expansion(node)
        write.finish("Not", write("Equal", x, x, dtype=ir.DataType.BOOL))


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and not value.dtype.is_floating_point()


ADAPTERS: Sequence[tuple[Iterable[str], int, Callable[[ir.Node, int], None]]] = (
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
    (("Max", "Min"), 12, _integer_extreme),
    (("CastLike",), 15, _cast_like),
    (("IsNaN", "IsInf"), ANY, _never),
)
"""Operators, the opset from which on they need no change, and how they change below it."""


def _shape(node: ir.Node, *axes: int) -> Sequence[Any] | None:
    """The shape of the first input, where it is known; a file may declare one without its axes."""
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    shape = tuple(value.shape)
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise CannotExpress(f"works along axis {axis} of a tensor of {len(shape)} dimensions")
    return shape


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
