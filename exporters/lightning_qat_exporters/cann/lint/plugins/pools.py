"""Rules on pooling."""

from __future__ import annotations

from math import prod

from lightning_qat_exporters.cann.lint.plugins.rule import PluginNode, Rule

_MAX = "ops-nn, max_pool_onnx_plugin.cpp"
_ALL = "ops-nn, max_pool_onnx_plugin.cpp, average_pool_onnx_plugin.cpp, lppool_onnx_plugin.cpp"
_LARGEST_WINDOW, _LARGEST_STRIDE = 255, 63


def _odd(node: PluginNode) -> str:
    pads = node.values.get("pads", ())
    return f"{len(pads)} pads" if len(pads) % 2 else ""


def _more_than_three(node: PluginNode) -> str:
    return "" if 1 <= len(node.window) <= 3 else f"kernel_shape {list(node.window)}"


def _indices(node: PluginNode) -> str:
    return "two outputs" if len(node.proto.output) > 1 else ""


def _dilated(node: PluginNode) -> str:
    dilations = node.values.get("dilations", ())
    return f"dilations {dilations}" if len(dilations) < 3 and any(d > 1 for d in dilations) else ""


def _same_lower(node: PluginNode) -> str:
    mode = node.values.get("auto_pad", "NOTSET")
    if mode == "SAME_LOWER":
        return f"auto_pad {mode}"
    # AvgPool3D and MaxPool3D: only the latter has a mode of padding.
    lost = node.proto.op_type == "AveragePool" and len(node.window) == 3
    return f"auto_pad {mode}" if lost and mode == "SAME_UPPER" else ""


def _is_large(node: PluginNode) -> bool:
    strides = node.values.get("strides", (1,))
    return prod(node.window) > _LARGEST_WINDOW or max(strides) > _LARGEST_STRIDE


def _large_and_rounded_up(node: PluginNode) -> str:
    if len(node.window) == 3 or not _is_large(node):
        return ""
    mode = node.values.get("auto_pad", "NOTSET")
    padded = f"auto_pad {mode}" if mode.startswith("SAME") else ""
    return ", ".join(filter(None, (node.differs(ceil_mode=0), padded)))


def _too_large(node: PluginNode) -> str:
    strides = node.values.get("strides", [1] * len(node.window))
    return f"a window of {list(node.window)}, strides {strides}" if _is_large(node) else ""


def _not_four(node: PluginNode) -> str:
    rank = node.rank()
    return "" if rank in (None, 4) else f"{rank} dimensions"


POOL_RULES = (
    Rule(
        "MaxPool AveragePool LpPool", "pads must be of even length", _ALL, _odd, "Write both ends"
    ),
    Rule(
        "MaxPool AveragePool LpPool",
        "a window must have one, two or three dimensions",
        _ALL,
        _more_than_three,
        "Pool in several steps",
    ),
    Rule(
        "MaxPool",
        "MaxPool must have one output; the plugin refuses the indices",
        _MAX,
        _indices,
        "Leave the second output out",
    ),
    Rule(
        "MaxPool",
        "storage_order must be 0",
        _MAX,
        lambda node: node.differs(storage_order=0),
        "Leave storage_order out",
    ),
    Rule(
        "MaxPool",
        "dilations of a MaxPool in one or two dimensions must be 1; the plugin leaves them out",
        _MAX,
        _dilated,
        "Take the positions apart by strided slices, pool each, or pool without dilation",
    ),
    Rule(
        "MaxPool AveragePool",
        "automatic pads must be written as numbers: SAME_LOWER is read as SAME, and AvgPool3D has "
        "no mode",
        f"{_MAX}, average_pool_onnx_plugin.cpp",
        _same_lower,
        "Write pads",
    ),
    Rule(
        "MaxPool",
        f"a window of more than {_LARGEST_WINDOW} values, or a stride above {_LARGEST_STRIDE}, "
        "must have ceil_mode 0 and pads as numbers: the plugin takes MaxPool with padding VALID "
        "then, but on Ascend950",
        _MAX,
        _large_and_rounded_up,
        "Write pads with which nothing is rounded up",
    ),
    Rule(
        "AveragePool",
        f"a window should have {_LARGEST_WINDOW} values or fewer and strides up to "
        f"{_LARGEST_STRIDE}",
        "ops-nn, avg_pool_v2_proto.h and avg_pool3_d_proto.h",
        _too_large,
        "Pool in two steps, or write GlobalAveragePool where the window is the whole input",
        "warning",
    ),
    Rule(
        "GlobalMaxPool",
        "GlobalMaxPool must read 4 dimensions: the plugin takes the maximum over the axes -1 and 2",
        "ops-nn, global_max_pool_onnx_plugin.cpp",
        _not_four,
        "Write ReduceMax over the spatial axes",
    ),
    Rule(
        "LpPool",
        "LpPool must have ceil_mode 0 and dilations 1; the plugin leaves them out",
        "ops-nn, lppool_onnx_plugin.cpp",
        lambda node: node.differs(
            ceil_mode=0, dilations=[1] * len(node.values.get("dilations", ()))
        ),
        "Write pads, or pool without dilation",
    ),
)
