"""Rules on what moves or resizes values."""

from __future__ import annotations

from lightning_qat_exporters.cann.lint.plugins.rule import PluginNode, Rule

_RESIZE = "ops-nn, resize_onnx_plugin.cpp"
_LIKE_NEAREST_KERNEL = (("asymmetric", "floor"), ("half_pixel", "round_prefer_ceil"))
"""Coordinates and rounding of the kernel: ``floor(x * step)``, ``floor((x + 0.5) * step)``."""


def _few_inputs(node: PluginNode) -> str:
    count = len(node.inputs)
    return f"{count} inputs" if node.opset > 10 and count < 3 else ""


def _unread_resize(node: PluginNode) -> str:
    axes = "axes" if "axes" in node.values else ""
    changed = node.differs(
        antialias=0,
        exclude_outside=0,
        extrapolation_value=0.0,
        cubic_coeff_a=-0.75,
        keep_aspect_ratio_policy="stretch",
    )
    return ", ".join(filter(None, (axes, changed)))


def _not_four(node: PluginNode) -> str:
    rank = node.rank()
    return "" if rank in (None, 4) else f"{rank} dimensions"


def _other_rounding(node: PluginNode) -> str:
    if node.values.get("mode", "nearest") != "nearest" or node.opset < 11:
        return ""
    coordinates = node.values.get("coordinate_transformation_mode", "half_pixel")
    rounding = node.values.get("nearest_mode", "round_prefer_floor")
    like = coordinates.replace("pytorch_half_pixel", "half_pixel"), rounding
    return "" if like in _LIKE_NEAREST_KERNEL else f"{coordinates} with {rounding}"


def _pad_axes(node: PluginNode) -> str:
    return "a fourth input" if node.has_input(3) else ""


def _split_parts(node: PluginNode) -> str:
    parts = node.values.get("num_outputs")
    if parts is None or node.has_input(1):
        return ""
    axis, sizes = node.values.get("axis", 0), node.sizes(0)
    if axis < 0 or (sizes is not None and axis >= len(sizes)):
        return f"axis {axis}" + (f" of {len(sizes)}" if sizes is not None else "")
    if parts < 1:
        return f"{parts} parts"
    size = sizes[axis] if sizes is not None else None
    return f"{size} in {parts} parts" if size is not None and size % parts else ""


def _reduction(node: PluginNode) -> str:
    return node.differs(reduction="none")


MOVE_RULES = (
    Rule(
        "Resize",
        "a Resize must have three inputs or more; the plugin refuses fewer",
        _RESIZE,
        _few_inputs,
        "Write an empty name for the roi that is left out",
    ),
    Rule(
        "Resize",
        "a Resize must be plain: the plugin reads mode and coordinate_transformation_mode alone",
        _RESIZE,
        _unread_resize,
        "Resize without them",
    ),
    Rule(
        "Resize",
        "a Resize must read 4 dimensions: nearest takes two sizes behind the first two, and the "
        "operator Resize four dimensions",
        f"{_RESIZE}, op_nn_proto_extend.h",
        _not_four,
        "Reshape to 4 dimensions around it; several spatial axes one after the other",
    ),
    Rule(
        "Resize",
        "nearest should be asymmetric with floor, or half_pixel with round_prefer_ceil: the plugin "
        "does not read nearest_mode, and ResizeNearestNeighborV2 is TensorFlow's",
        f"{_RESIZE}, op_nn_proto_extend.h",
        _other_rounding,
        "Write one of these, as F.interpolate(mode='nearest') is exported",
        "warning",
    ),
    Rule(
        "Resize",
        "a Resize should be nearest or linear; its registration names no other as supported",
        "ops-nn, op_nn_proto_extend.h",
        lambda node: "mode cubic" if node.values.get("mode") == "cubic" else "",
        "Train with bilinear, or make sure that your product has cubic",
        "warning",
    ),
    Rule(
        "Pad",
        "a Pad must have all axes in its pads: PadV3 has no input for axes",
        "ops-math, pad_onnx_plugin.cpp and pad_v3_proto.h",
        _pad_axes,
        "Write pads for every axis and leave the fourth input out",
    ),
    Rule(
        "Split",
        "a Split by num_outputs must have an axis from 0 and equal parts; the plugin divides the "
        "size and refuses a rest",
        "ops-math, split_onnx_plugin.cpp",
        _split_parts,
        "Write the sizes of the parts as an input, and the axis from the front",
    ),
    Rule(
        "Transpose",
        "a Transpose must have perm; the plugin refuses one without",
        "ops-math, transpose_onnx_plugin.cpp",
        lambda node: "" if node.values.get("perm") else "no perm",
        "Write perm",
    ),
    Rule(
        "DepthToSpace",
        "blocksize must be 2 or more",
        "ops-math, depth_to_space_onnx_plugin.cpp",
        lambda node: "blocksize 1" if node.values.get("blocksize") == 1 else "",
        "Remove the node",
    ),
    Rule(
        "Shape",
        "a Shape must be whole: the plugin reads neither start nor end",
        "ops-math, shape_onnx_plugin.cpp",
        lambda node: ", ".join(
            f"{key} {node.values[key]}" for key in ("start", "end") if key in node.values
        ),
        "Write Slice behind the Shape",
    ),
    Rule(
        "ScatterND",
        "a ScatterND must replace values: of the two plugins for it one reads no reduction",
        "ops-math, similar_opp_onnx_plugin.cpp; ops-nn, scatter_nd_onnx_plugin.cpp",
        _reduction,
        "Write the reduction with other operators",
    ),
    Rule(
        "GridSample",
        "mode and padding_mode must be written; the plugin hands on an empty word for one that is "
        "left out",
        "ops-cv, grid_sample_onnx_plugin.cpp",
        lambda node: ", ".join(
            f"no {key}" for key in ("mode", "padding_mode") if key not in node.values
        ),
        "Write both",
    ),
)
