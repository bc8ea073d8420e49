"""Rules on convolutions, matrix products and recurrent layers, integer or float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_qat_exporters.cann.lint.plugins.rule import PluginNode, Rule

_CONV = "ops-nn, conv_onnx_plugin.cpp"
_TRANSPOSED = "ops-nn, conv_transpose_onnx_plugin.cpp"
_OPERATORS = "ops-nn, op_nn_proto_extend.h"
_LARGEST: Mapping[str, Mapping[str, int]] = {
    "Conv": {"kernel": 511, "strides": 63, "pads": 255, "dilations": 255},
    "ConvTranspose": {"kernel": 255, "strides": 63, "pads": 255, "dilations": 255},
}
_WIDEST = 4096


def _no_dimensions(node: PluginNode) -> str:
    written = ("kernel_shape", "pads", "strides", "dilations")
    return "" if any(key in node.values for key in written) else "none of them"


def _odd(node: PluginNode) -> str:
    pads = node.values.get("pads", ())
    return f"{len(pads)} pads" if len(pads) % 2 else ""


def _automatic_pads(node: PluginNode) -> str:
    mode = node.values.get("auto_pad", "NOTSET")
    return f"auto_pad {mode}" if len(node.window) == 3 and mode not in ("NOTSET", "VALID") else ""


def _integer_3d(node: PluginNode) -> str:
    return (
        f"an int8 weight of rank {len(node.window) + 2}"
        if (node.is_integer and len(node.window) == 3)
        else ""
    )


def _integer_1d(node: PluginNode) -> str:
    return "one dimension" if node.is_integer and len(node.window) == 1 else ""


def _graph_mode_3d(node: PluginNode) -> str:
    if len(node.window) != 3:
        return ""
    return node.differs(dilations=[1, 1, 1], output_padding=[0, 0, 0])


def _too_large(node: PluginNode) -> str:
    spatial = slice(1, None) if len(node.window) == 3 else slice(None)  # depth has no such limit
    largest = _LARGEST[node.proto.op_type]
    pads = node.values.get("pads", ())
    half = len(pads) // 2
    found: Mapping[str, Sequence[int]] = {
        "kernel": node.window[spatial],
        "strides": node.values.get("strides", ())[spatial],
        "pads": (*pads[:half][spatial], *pads[half:][spatial]),
        "dilations": node.values.get("dilations", ())[spatial],
    }
    broken = (
        f"{key} {max(sizes)} (up to {largest[key]})"
        for key, sizes in found.items()
        if sizes and max(sizes) > largest[key]
    )
    return ", ".join(broken)


def _too_wide(node: PluginNode) -> str:
    sizes = node.sizes(0)
    width = sizes[-1] if sizes and len(sizes) > 2 else None
    return f"a width of {width}" if width is not None and width > _WIDEST else ""


def _lost_factor(node: PluginNode) -> str:
    return "" if node.has_input(2) else node.differs(alpha=1.0)


def _few_dimensions(node: PluginNode) -> str:
    ranks = [rank for rank in (node.rank(0), node.rank(1)) if rank is not None]
    wrong = [rank for rank in ranks if not 2 <= rank <= 6]
    return f"an operand of {wrong[0]} dimensions" if wrong else ""


def _unread_recurrent(node: PluginNode) -> str:
    unread = node.differs(linear_before_reset=0, layout=0, input_forget=0)
    written = [key for key in ("clip", "activation_alpha", "activation_beta") if key in node.values]
    plain = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}[node.proto.op_type]
    functions = [
        f.decode() if isinstance(f, bytes) else f for f in node.values.get("activations", ())
    ]
    if functions and functions != plain * (len(functions) // len(plain)):
        written.append("activations")
    return ", ".join(filter(None, (unread, *written)))


LAYER_RULES = (
    Rule(
        "Conv",
        "a convolution must have kernel_shape, pads, strides or dilations; the plugin refuses one "
        "without",
        _CONV,
        _no_dimensions,
        "Write kernel_shape",
    ),
    Rule("Conv ConvTranspose", "pads must be of even length", _CONV, _odd, "Write both ends"),
    Rule(
        "Conv",
        "a convolution of three dimensions must have pads or auto_pad VALID",
        _CONV,
        _automatic_pads,
        "Write the pads as numbers; lightning-qat convert does",
    ),
    Rule(
        "Conv",
        "an integer convolution should have one or two dimensions: Conv3D is registered with int8, "
        "but its tables of types list float16 and bfloat16 alone",
        _OPERATORS,
        _integer_3d,
        "Leave the layer float unless your product is known to take it",
        "warning",
    ),
    Rule(
        "Conv",
        "between AscendQuant and AscendDequant a convolution of one dimension becomes Unsqueeze, "
        "Conv2D and Squeeze, and only some platforms have the pass that moves these out of the way",
        "ops-nn, quant_unsqueeze_conv2d_fusion_pass.cpp",
        _integer_1d,
        "Where ATC refuses the layer, write it as Conv2d with a height of 1",
        "advice",
    ),
    Rule(
        "ConvTranspose",
        "a transposed convolution must have kernel_shape; the plugin refuses one without",
        _TRANSPOSED,
        lambda node: "" if "kernel_shape" in node.values else "no kernel_shape",
        "Write kernel_shape",
    ),
    Rule(
        "ConvTranspose",
        "output_shape must be left out: behind one that has it, the plugin pads every transposed "
        "convolution without auto_pad as SAME_LOWER",
        _TRANSPOSED,
        lambda node: (
            f"output_shape {node.values['output_shape']}" if "output_shape" in node.values else ""
        ),
        "Write pads and output_padding",
    ),
    Rule(
        "ConvTranspose",
        "a transposed convolution of three dimensions must be float: Conv3DTranspose is registered "
        "for float16 and bfloat16",
        _OPERATORS,
        _integer_3d,
        "Leave the layer float",
    ),
    Rule(
        "ConvTranspose",
        "a transposed convolution of three dimensions must have dilations 1 and output_padding 0 "
        "in graph mode",
        _OPERATORS,
        _graph_mode_3d,
        "Write zeros between the weights, or crop the output behind the layer",
    ),
    Rule(
        "Conv ConvTranspose",
        "kernels, strides, pads and dilations must be in the operator's ranges",
        _OPERATORS,
        _too_large,
        "Split the layer, or leave it to the host",
        "warning",
    ),
    Rule(
        "Conv",
        f"the width of a convolution's input should be {_WIDEST} or less; more may not compile",
        _OPERATORS,
        _too_wide,
        "Cut the input into pieces, or let it run along the height",
        "warning",
    ),
    Rule(
        "Gemm",
        "a Gemm without a third input must have alpha 1; the plugin leaves the factor out",
        "ops-nn, gemm_onnx_plugin.cpp",
        _lost_factor,
        "Multiply the weight by alpha, or give it a bias of zeros",
    ),
    Rule(
        "MatMul",
        "both operands of a MatMul must have 2 to 6 dimensions, those of BatchMatMulV2",
        _OPERATORS,
        _few_dimensions,
        "Write Unsqueeze before the MatMul and Squeeze behind it",
    ),
    Rule(
        "LSTM GRU",
        "a float LSTM or GRU must be ONNX's default in all but direction and hidden_size; the "
        "plugin reads no other attribute",
        "ops-nn, lstm_onnx_plugin.cpp and gru_onnx_plugin.cpp",
        _unread_recurrent,
        "Quantize the layer, whose steps are then unrolled, or write its steps",
    ),
)
