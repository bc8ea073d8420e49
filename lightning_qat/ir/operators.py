"""The one table of operators: how quantization treats each, and its names in torch, ATen and ONNX.

To add an operator is one row here, one lowering in each target that needs one, and one test. The
traits are NNCF's ``QuantizationTrait``:

- ``inputs_quantizable``: computes with real values; an integer target needs its inputs quantized.
- ``concat``: as that, but all inputs share one scale and zero point, which the output keeps.
- ``quantization_agnostic``: outputs values of its input (or zero); the output keeps the input's
  scale and zero point.

The table is plain strings, so that every room and every target can read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Trait = Literal["inputs_quantizable", "concat", "quantization_agnostic"]
Range = tuple[float, float]


class Clamp(NamedTuple):
    """The arguments of an operator that clamps.

    Args:
        low: Lower end where the call gives none; ``None``: no lower end.
        high: Upper end where the call gives none; ``None``: no upper end.
        arguments: Names of the two ends in a call; the ends are its second and third argument.
            Empty for an operator with fixed ends.
    """

    low: float | None
    high: float | None
    arguments: tuple[str, ...] = ()


class Operator(NamedTuple):
    """One operator.

    Args:
        name: One name for all spellings. It is part of the call keys that checkpoints store
            (``add@forward[+#0]:0``), so it never changes.
        trait: How quantization treats its inputs and output. ``None``: it is no operand's consumer;
            its result is quantized where it is read.
        operands: How many arguments are quantized; a list of tensors counts as one.
        first: Position of the first of them.
        torch: Names in ``torch``, ``torch.Tensor``, ``torch.nn.functional`` and ``torch._C._nn``.
        aten: Names of overload packets in ``torch.ops.aten``.
        onnx: ONNX operator types.
        output_range: The range that its output has by definition, in 8 bits.
        clamp: Ends of an operator that clamps.
        depends_on_arguments: Only some calls have this trait; see ``function_table.py``.
    """

    name: str
    trait: Trait | None
    operands: int = 1
    torch: tuple[str, ...] = ()
    aten: tuple[str, ...] = ()
    onnx: tuple[str, ...] = ()
    output_range: Range | None = None
    clamp: Clamp | None = None
    depends_on_arguments: bool = False
    first: int = 0


def _operator(
    name: str,
    trait: Trait | None,
    operands: int = 1,
    *,
    torch: str = "",
    aten: str = "",
    onnx: str = "",
    output_range: Range | None = None,
    clamp: Clamp | None = None,
    depends_on_arguments: bool = False,
    first: int = 0,
) -> Operator:
    """A row, its names as one string with spaces between them."""
    names = tuple(torch.split()), tuple(aten.split()), tuple(onnx.split())
    return Operator(name, trait, operands, *names, output_range, clamp, depends_on_arguments, first)


_INPUTS: Trait = "inputs_quantizable"
_AGNOSTIC: Trait = "quantization_agnostic"

# TFLite's specification demands the scales 1/256 and 1/128 with zero points -128 and 0.
_UNIT: Range = (0.0, 255.0 / 256.0)
_SIGNED_UNIT: Range = (-1.0, 127.0 / 128.0)

OPERATORS: tuple[Operator, ...] = (
    _operator(
        "add", _INPUTS, 2, torch="add add_ __add__ __radd__ __iadd__", aten="add", onnx="Add"
    ),
    _operator(
        *("sub", _INPUTS, 2),
        torch="sub sub_ __sub__ __rsub__ __isub__ subtract rsub",
        aten="sub rsub",
        onnx="Sub",
    ),
    _operator(
        *("mul", _INPUTS, 2),
        torch="mul mul_ __mul__ __rmul__ __imul__ multiply",
        aten="mul",
        onnx="Mul",
    ),
    _operator(
        *("matmul", _INPUTS, 2),
        torch="matmul __matmul__ __rmatmul__ bmm mm",
        aten="matmul bmm mm",
        onnx="MatMul",
    ),
    # What is added to the product stays as it is.
    _operator("baddbmm", _INPUTS, 2, torch="baddbmm", aten="baddbmm", first=1),
    _operator("addmm", _INPUTS, 2, torch="addmm", aten="addmm", onnx="Gemm", first=1),
    *(
        _operator(name, _INPUTS, 2, torch=name, aten=name)
        for name in (
            *("linear", "conv1d", "conv2d", "conv3d"),
            *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        )
    ),
    # Of two tensors that it multiplies as matrices: ``numerics/einsum.py``.
    _operator(
        *("einsum", _INPUTS, 2),
        torch="einsum",
        aten="einsum",
        onnx="Einsum",
        depends_on_arguments=True,
        first=1,
    ),
    _operator(
        *("scaled_dot_product_attention", _INPUTS, 3),
        torch="scaled_dot_product_attention",
        aten="scaled_dot_product_attention",
        onnx="Attention",
    ),
    _operator("cat", "concat", torch="cat concat concatenate", aten="cat", onnx="Concat"),
    _operator("stack", "concat", torch="stack", aten="stack"),
    _operator(
        *("avg_pool", _INPUTS),
        torch="avg_pool1d avg_pool2d avg_pool3d",
        aten="avg_pool1d avg_pool2d avg_pool3d",
        onnx="AveragePool",
    ),
    _operator(
        *("adaptive_avg_pool", _INPUTS),
        torch="adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
        aten="adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
        onnx="GlobalAveragePool",
    ),
    _operator("mean", _INPUTS, torch="mean", aten="mean", onnx="ReduceMean"),
    _operator("var", _INPUTS, torch="var var_mean", aten="var var_mean"),
    _operator("std", _INPUTS, torch="std std_mean", aten="std std_mean"),
    # A power of 1 or more: the others are infinite at 0, which is on every grid.
    _operator(
        *("pow", _INPUTS),
        torch="pow pow_ __pow__ __ipow__ square square_",
        aten="pow square",
        onnx="Pow",
        depends_on_arguments=True,
    ),
    _operator(
        "softmax", _INPUTS, torch="softmax", aten="softmax", onnx="Softmax", output_range=_UNIT
    ),
    _operator(
        *("sigmoid", _INPUTS),
        torch="sigmoid sigmoid_",
        aten="sigmoid",
        onnx="Sigmoid",
        output_range=_UNIT,
    ),
    _operator(
        *("tanh", _INPUTS),
        torch="tanh tanh_",
        aten="tanh",
        onnx="Tanh",
        output_range=_SIGNED_UNIT,
    ),
    _operator("hardswish", _INPUTS, torch="hardswish", aten="hardswish", onnx="HardSwish"),
    _operator(
        *("hardsigmoid", _INPUTS),
        torch="hardsigmoid",
        aten="hardsigmoid",
        onnx="HardSigmoid",
        output_range=_UNIT,
    ),
    # Computed in float by every target, but what is added up before it can be integers.
    _operator(
        "layer_norm", _INPUTS, torch="layer_norm", aten="layer_norm", onnx="LayerNormalization"
    ),
    _operator("rms_norm", _INPUTS, torch="rms_norm", aten="rms_norm", onnx="RMSNormalization"),
    _operator(
        "group_norm", _INPUTS, torch="group_norm", aten="group_norm", onnx="GroupNormalization"
    ),
    _operator(
        *("instance_norm", _INPUTS),
        torch="instance_norm",
        aten="instance_norm",
        onnx="InstanceNormalization",
    ),
    _operator("normalize", _INPUTS, torch="normalize", onnx="LpNormalization"),
    _operator("gelu", _INPUTS, torch="gelu", aten="gelu", onnx="Gelu"),
    _operator("silu", _INPUTS, torch="silu", aten="silu", onnx="Swish"),
    _operator("mish", _INPUTS, torch="mish", aten="mish", onnx="Mish"),
    _operator("elu", _INPUTS, torch="elu", aten="elu", onnx="Elu"),
    _operator("selu", _INPUTS, torch="selu", aten="selu", onnx="Selu"),
    _operator("celu", _INPUTS, torch="celu", aten="celu", onnx="Celu"),
    _operator("softplus", _INPUTS, torch="softplus", aten="softplus", onnx="Softplus"),
    _operator("glu", _INPUTS, torch="glu", aten="glu"),
    _operator("leaky_relu", _INPUTS, torch="leaky_relu", aten="leaky_relu", onnx="LeakyRelu"),
    _operator("prelu", _INPUTS, torch="prelu", aten="prelu", onnx="PRelu"),
    # The grid of an affine quantizer holds no negatives of its values.
    _operator(
        *("neg", _INPUTS),
        torch="neg neg_ __neg__ negative",
        aten="neg negative",
        onnx="Neg",
    ),
    _operator(
        *("abs", _INPUTS), torch="abs abs_ __abs__ absolute", aten="abs absolute", onnx="Abs"
    ),
    _operator(
        *("maximum", _INPUTS, 2),
        torch="maximum minimum",
        aten="maximum minimum",
    ),
    _operator("cumsum", _INPUTS, torch="cumsum", aten="cumsum", onnx="CumSum"),
    # Where it reads is computed exactly.
    _operator("grid_sample", _INPUTS, torch="grid_sample", aten="grid_sampler", onnx="GridSample"),
    # Its mode "nearest" keeps values; ATen has operators of their own for that, the next row.
    _operator(
        *("interpolate", _INPUTS),
        torch="interpolate upsample",
        aten="upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d",
        onnx="Resize",
    ),
    _operator(
        "upsample_nearest",
        _AGNOSTIC,
        aten="upsample_nearest1d upsample_nearest2d upsample_nearest3d",
    ),
    _operator(
        *("relu", _AGNOSTIC),
        torch="relu relu_",
        aten="relu",
        onnx="Relu",
        clamp=Clamp(0.0, None),
    ),
    # An end such as 6 may lie between two integers, so these keep no scale in general.
    _operator(
        *("relu6", None),
        torch="relu6",
        aten="relu6",
        clamp=Clamp(0.0, 6.0),
    ),
    _operator(
        *("hardtanh", None),
        torch="hardtanh",
        aten="hardtanh",
        clamp=Clamp(-1.0, 1.0, ("min_val", "max_val")),
    ),
    _operator(
        *("clamp", None),
        torch="clamp clip",
        aten="clamp clip",
        onnx="Clip",
        clamp=Clamp(None, None, ("min", "max")),
    ),
    _operator(
        *("max_pool", _AGNOSTIC),
        torch="max_pool1d max_pool2d max_pool3d",
        aten="max_pool1d max_pool2d max_pool3d",
        onnx="MaxPool",
    ),
    _operator(
        *("adaptive_max_pool", _AGNOSTIC),
        torch="adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
        aten="adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
        onnx="GlobalMaxPool",
    ),
    _operator(
        *("amax", _AGNOSTIC), torch="amax amin", aten="amax amin", onnx="ReduceMax ReduceMin"
    ),
    # Of one tensor; the larger ones of two are no values of the first.
    _operator(
        *("max", _AGNOSTIC),
        torch="max min",
        aten="max min",
        onnx="Max Min",
        depends_on_arguments=True,
    ),
    _operator(
        *("topk", _AGNOSTIC),
        torch="topk sort",
        aten="topk sort",
        onnx="TopK",
    ),
    _operator(
        *("gather", _AGNOSTIC),
        torch="gather take_along_dim",
        aten="gather take_along_dim",
        onnx="GatherElements",
    ),
    _operator("triangle", _AGNOSTIC, torch="tril triu", aten="tril triu", onnx="Trilu"),
    # Filled with zero; another number lies on no grid in general.
    _operator(
        *("masked_fill", _AGNOSTIC),
        torch="masked_fill masked_fill_",
        aten="masked_fill",
        depends_on_arguments=True,
    ),
    # Padding with zero keeps values, padding with any other number does not.
    _operator(
        *("pad", _AGNOSTIC),
        torch="pad",
        aten="pad constant_pad_nd",
        onnx="Pad",
        depends_on_arguments=True,
    ),
    _operator(
        *("dropout", _AGNOSTIC),
        torch="dropout dropout1d dropout2d dropout3d feature_dropout",
        aten="dropout feature_dropout",
        onnx="Dropout",
    ),
    _operator(
        *("reshape", _AGNOSTIC),
        torch="reshape view flatten unflatten squeeze unsqueeze reshape_as view_as ravel",
        aten="reshape view flatten unflatten squeeze unsqueeze reshape_as view_as ravel",
        onnx="Reshape Flatten Squeeze Unsqueeze",
    ),
    _operator(
        *("permute", _AGNOSTIC),
        torch="permute transpose movedim swapaxes t swapdims moveaxis T mT H mH",
        aten="permute transpose movedim swapaxes t swapdims moveaxis",
        onnx="Transpose",
    ),
    _operator(
        *("expand", _AGNOSTIC),
        torch="expand repeat tile broadcast_to expand_as repeat_interleave",
        aten="expand repeat tile broadcast_to expand_as repeat_interleave",
        onnx="Expand Tile",
    ),
    _operator(
        *("contiguous", _AGNOSTIC),
        torch="contiguous clone detach",
        aten="contiguous clone detach",
        onnx="Identity",
    ),
    _operator(
        *("getitem", _AGNOSTIC),
        torch="__getitem__ narrow select index_select flip roll",
        aten="slice narrow select index_select flip roll",
        onnx="Slice Gather",
    ),
    _operator(
        *("chunk", _AGNOSTIC),
        torch="chunk split unbind tensor_split split_with_sizes",
        aten="chunk split unbind tensor_split split_with_sizes",
        onnx="Split",
    ),
    _operator(
        *("pixel_shuffle", _AGNOSTIC),
        torch="pixel_shuffle pixel_unshuffle channel_shuffle",
        aten="pixel_shuffle pixel_unshuffle channel_shuffle",
        onnx="DepthToSpace SpaceToDepth",
    ),
)

LAYER_FUNCTIONS = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
"""Names of the operators that layers call, beside the users who call them with weights."""

PRODUCTS = LAYER_FUNCTIONS | {"matmul", "addmm", "baddbmm", "einsum"}
"""Names of the operators that multiply two tensors and add up."""

LAYER_TYPES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""ONNX operator types of layers with a weight, which run on integers."""

RECURRENT_TYPES = ("LSTM", "GRU")
"""ONNX operator types of recurrent layers."""

FIXED_OUTPUT_RANGES: Mapping[str, Range] = {
    operator.name: operator.output_range
    for operator in OPERATORS
    if operator.output_range is not None
}
"""Operator name to the range that its output has by definition, in 8 bits."""

CLAMPS: Mapping[str, Clamp] = {
    operator.name: operator.clamp for operator in OPERATORS if operator.clamp is not None
}
"""Operator name to the ends of an operator that clamps."""


def value_preserving(of: Literal["aten", "onnx"]) -> tuple[str, ...]:
    """Names of the operators whose output always keeps the scale and zero point of their input.

    Padding is left out, because only padding with zero does; so are the concatenations, whose
    inputs must share a scale first.

    Args:
        of: ``aten``: overload packets in ``torch.ops.aten``; ``onnx``: operator types.

    Example:
        >>> "MaxPool" in value_preserving("onnx"), "Pad" in value_preserving("onnx")
        (True, False)
    """
    return tuple(
        name
        for operator in OPERATORS
        if operator.trait == "quantization_agnostic" and not operator.depends_on_arguments
        for name in (operator.aten if of == "aten" else operator.onnx)
    )


def fixed_scale_and_zero_point(name: str) -> tuple[float, int]:
    """Scale and zero point of the int8 output of an operator with a range by definition.

    Args:
        name: Name of the operator, as in ``FIXED_OUTPUT_RANGES``.

    Example:
        >>> fixed_scale_and_zero_point("sigmoid"), fixed_scale_and_zero_point("tanh")
        ((0.00390625, -128), (0.0078125, 0))
    """
    low, high = FIXED_OUTPUT_RANGES[name]
    scale = (high - low) / 255.0
    return scale, -128 - round(low / scale)
