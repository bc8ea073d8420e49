"""Find the shapes of a deploy model's tensors, through operators that ONNX does not know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
import onnx_ir as ir

from lightning_qat.ir.operators import LAYER_TYPES
from lightning_qat_exporters.cann.standard_operators.recurrent import RECURRENT
from lightning_qat_exporters.onnx_files.boundary.inference import check_inference

_SAME_SHAPE = ("AscendQuant", "AscendDequant", "AscendAntiQuant")
_FEW = 64
"""Numbers in a tensor that may be a shape."""


def input_channels(model: ir.Model) -> dict[ir.Node, int]:
    """The input channels of the data of each layer and device node, where they are known.

    AMCT's files say no shape but those of inputs and outputs, so ONNX's inference runs on a model
    of the same shapes: Identity for Ascend's operators, and weights, whose input channels may be
    packed, of unknown size along them.
    """
    data: dict[ir.Node, ir.Value] = {}
    for node in model.graph:
        value = node.inputs[0] if node.inputs else None
        if value is not None and node.op_type in (*LAYER_TYPES, *RECURRENT):
            data[node] = value
    found = {node: _channels(node, _sizes(value.shape or ())) for node, value in data.items()}
    if None in found.values():
        shapes_only = _shapes_only(model)
        check_inference(shapes_only, "the deploy model")
        inferred = onnx.shape_inference.infer_shapes(shapes_only, data_prop=True)
        dims = {v.name: v.type.tensor_type.shape.dim for v in inferred.graph.value_info}
        for node, value in data.items():
            if found[node] is None:
                sizes = [d.dim_value or None for d in dims.get(value.name or "", ())]
                found[node] = _channels(node, sizes)
    return {node: channels for node, channels in found.items() if channels is not None}


def _channels(node: ir.Node, sizes: Sequence[int | None]) -> int | None:
    axis = 1 if node.op_type.startswith("Conv") else len(sizes) - 1
    return sizes[axis] if 0 <= axis < len(sizes) else None


def _sizes(shape: Iterable[object]) -> list[int | None]:
    return [d if isinstance(d, int) else None for d in shape]


def _shapes_only(model: ir.Model) -> onnx.ModelProto:
    proto = onnx.ModelProto(ir_version=model.ir_version)
    proto.opset_import.extend([onnx.helper.make_opsetid("", model.opset_imports[""])])
    graph = proto.graph
    graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in model.graph.outputs)
    graph.node.extend(map(_same_shape, model.graph))
    packed = {name: axis for node in model.graph for name, axis in _packed_axis(node)}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        tensor, name = value.const_value, value.name or ""
        if tensor is not None and tensor.dtype == ir.DataType.INT64 and tensor.size <= _FEW:
            graph.initializer.append(onnx.numpy_helper.from_array(tensor.numpy(), name))
        elif value.shape is not None:
            shape = _sizes(value.shape)
            if name in packed:
                shape[packed[name]] = None
            kind = int(value.dtype or ir.DataType.FLOAT)
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    return proto


def _same_shape(node: ir.Node) -> onnx.NodeProto:
    """A node, or one that ONNX knows and that makes the same shapes."""
    proto = ir.to_proto(node)
    if node.op_type in _SAME_SHAPE:
        return onnx.helper.make_node("Identity", proto.input[:1], proto.output)
    if node.op_type in RECURRENT:
        hidden = node.attributes.get_int("hidden_size")
        kind = RECURRENT[node.op_type]
        return onnx.helper.make_node(kind, proto.input[:3], proto.output, hidden_size=hidden)
    return proto


def _packed_axis(node: ir.Node) -> list[tuple[str, int]]:
    """The axis of a layer's weight along which it may be packed, by the weight's name."""
    weight = node.inputs[1] if node.op_type in LAYER_TYPES and len(node.inputs) > 1 else None
    if weight is None or weight.name is None or weight.dtype != ir.DataType.INT8:
        return []
    return [(weight.name, 1 if node.op_type == "Conv" else node.attributes.get_int("transB", 0))]
