"""Rules on functions of values, reductions and normalizations."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from lightning_qat_exporters.cann.lint.plugins.rule import PluginNode, Rule

_SELU = {"alpha": 1.67326324235, "gamma": 1.05070098736}
_UNPACKED = (
    onnx.TensorProto.INT64,
    onnx.TensorProto.INT32,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
)


def _no_bound(node: PluginNode) -> str:
    bounded = node.opset < 11 or node.has_input(1) or node.has_input(2)
    return "" if bounded else "neither min nor max"


def _is_last(axis: int, sizes: Sequence[int | None] | None) -> bool | None:
    """Whether nothing lies behind an axis; None where the file does not tell."""
    if axis == -1:
        return True
    if sizes is None:
        return None
    behind = sizes[axis % len(sizes) + 1 :]
    return all(size == 1 for size in behind)


def _flattened(node: PluginNode) -> str:
    if node.opset >= 13:
        return ""
    axis = node.values.get("axis", 1)
    return f"axis {axis} of {node.rank()}" if _is_last(axis, node.sizes(0)) is False else ""


def _log_axis(node: PluginNode) -> str:
    return "no axis" if node.opset < 13 and "axis" not in node.values else _flattened(node)


def _other_selu(node: PluginNode) -> str:
    return ", ".join(
        f"{key} {node.values[key]:.6g}"
        for key, default in _SELU.items()
        if abs(node.values.get(key, default) - default) > 1e-5
    )


def _even_size(node: PluginNode) -> str:
    size = node.values.get("size", 1)
    return "" if size % 2 else f"size {size}"


def _not_images(node: PluginNode) -> str:
    rank = node.rank()
    return "" if rank in (None, 4, 5) else f"{rank} dimensions"


def _unread_fill(node: PluginNode) -> str:
    tensor = next((a.t for a in node.proto.attribute if a.name == "value"), None)
    if tensor is None or tensor.raw_data or tensor.data_type in _UNPACKED:
        return ""
    return f"{onnx.TensorProto.DataType.Name(tensor.data_type)} outside raw_data"


def _type_without_cast(node: PluginNode) -> str:
    kind = node.values["to"]
    known = kind <= onnx.TensorProto.BFLOAT16
    return "" if known else f"to {onnx.TensorProto.DataType.Name(kind)}"


def _one_dimensional_slope(node: PluginNode) -> str:
    sizes = node.sizes(1)
    if sizes is None or len(sizes) < 2:
        return ""
    spread = [axis for axis, size in enumerate(sizes) if size != 1]
    rank = node.rank()
    channels = rank is not None and spread in ([], [len(sizes) - (rank - 1)])
    return "" if channels or rank is None else f"a slope of shape {list(sizes)}"


def _remainder(node: PluginNode) -> str:
    return node.differs(fmod=0)


FUNCTION_RULES = (
    Rule(
        "Clip",
        "a Clip must have min or max; the plugin refuses one without",
        "ops-math, clip_onnx_plugin.cpp",
        _no_bound,
        "Remove the node",
    ),
    Rule(
        "Softmax",
        "below opset 13 a Softmax should run along the last axis: ONNX flattens what lies behind "
        "its axis, and the plugin hands on one axis",
        "ops-nn, softmax_onnx_plugin.cpp",
        _flattened,
        "Write Transpose around it, or opset 13",
        "warning",
    ),
    Rule(
        "LogSoftmax",
        "below opset 13 a LogSoftmax must name its axis, the last: ONNX's default is 1, that of "
        "the plugin -1",
        "ops-nn, logsoftmax_onnx_plugin.cpp",
        _log_axis,
        "Write axis -1, with Transpose around it where it is another",
    ),
    Rule(
        "Selu",
        "alpha and gamma must be ONNX's defaults; the plugin refuses others",
        "ops-nn, selu_onnx_plugin.cpp",
        _other_selu,
        "Write Elu and Mul",
    ),
    Rule(
        "ArgMax ArgMin",
        "select_last_index must be 0",
        "ops-math, argmax_onnx_plugin.cpp and argmin_onnx_plugin.cpp",
        lambda node: node.differs(select_last_index=0),
        "Leave select_last_index out",
    ),
    Rule(
        "LRN",
        "size must be odd: the plugin takes as many channels on both sides",
        "ops-nn, lrn_onnx_plugin.cpp",
        _even_size,
        "Normalize over an odd number of channels",
    ),
    Rule(
        "BatchNormalization",
        "a batch norm that stays should read 4 or 5 dimensions, which BatchNorm is documented for",
        "ops-nn, batch_norm_proto.h",
        _not_images,
        "Put it behind a layer, where it is folded, or write Mul and Add",
        "warning",
    ),
    Rule(
        "BatchNormalization",
        "a batch norm must be one of inference",
        "ops-nn, batch_normalization_onnx_plugin.cpp",
        lambda node: node.differs(training_mode=0),
        "Export in eval mode",
    ),
    Rule(
        "ConstantOfShape",
        "a value outside raw_data must be int32, int64, float or double",
        "ops-nn, constantofshape_onnx_plugin.cpp",
        _unread_fill,
        "Store the value as raw_data",
    ),
    Rule(
        "Cast",
        "a Cast must be to a type of 8 to 64 bits that the plugin knows, up to bfloat16",
        "ops-math, cast_onnx_plugin.cpp and onnx_common.h",
        _type_without_cast,
        "Cast to another type",
    ),
    Rule(
        "PRelu",
        "a slope should be one number, or one for each channel",
        "ops-nn, p_relu_proto.h",
        _one_dimensional_slope,
        "Write Relu, Neg and Mul",
        "warning",
    ),
    Rule(
        "Mod",
        "fmod must be 0; the plugin does not read it",
        "ops-math, mod_onnx_plugin.cpp",
        _remainder,
        "Write Div, Floor, Mul and Sub",
    ),
)
