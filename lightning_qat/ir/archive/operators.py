"""What the graph of a converted model may call: operators that compute numbers from numbers."""

from __future__ import annotations

import re
from functools import cache

from lightning_qat.model.torch_private import operator_arguments

_OPERATOR = re.compile(
    r"torch\.ops\.(?P<library>aten|prims|lightning_qat|torchvision|quantized_decomposed)"
    r"\.(?P<name>[a-zA-Z_0-9]+)\.(?P<overload>\w+)"
)
_FUNCTION = re.compile(
    r"torch\.ops\.higher_order\.(cond|while_loop|scan|wrap_with_set_grad_enabled"
    r"|wrap_with_autocast)"
    r"|torch\.sym_(float|int|ite|max|min|not|sqrt|sum)|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lt|mod|mul|ne|neg|or_|pos|pow|sub|truediv)"
)
_INTERNAL = re.compile(
    r"_(assert_\w+|softmax|log_softmax|safe_softmax|to_copy|unsafe_view|native_batch_norm_legit\w*"
    r"|batch_norm_\w+|fused_rms_norm|scaled_dot_product_\w+|adaptive_avg_pool[23]d|convolution"
    r"|upsample_(bicubic|bilinear)2d_aa|upsample_nearest_exact[123]d|local_scalar_dense"
    r"|weight_norm(_interface)?|trilinear|prelu_kernel|fft_[cr]2[cr]|cdist_forward|conj(_physical)?"
    r"|fake_quantize_\w+|int_mm|shape_as_tensor|unique2|functional_sym_\w+|add_relu|stack"
    r"|native_multi_head_attention|transformer_encoder_layer_fwd|thnn_fused_(gru|lstm)_cell"
    r"|pack_padded_sequence|pad_packed_sequence|embedding_bag(_forward_only)?|logcumsumexp)"
)
"""Operators with a leading underscore that torch.export writes for common functions."""
_REACHES_FURTHER = re.compile(
    r"from_file|set_|set|set_data|data|resize\w*|record_stream|pin_memory|is_pinned"
    r"|(fbgemm|mkldnn|cudnn|miopen|mps|quantized)_\w+|_?print|warn|save"
)
"""Operators that read files, print, point to other memory, or read memory as a C++ object."""
_VISION = ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
"""Of torchvision; others of its operators read and write files."""
_TEXTS = frozenset(
    "reduce padding_side norm approximate mode pad_mode ord rounding_mode interpolation driver "
    "UPLO side padding equation indexing p assert_msg".split()
)
"""Arguments that are texts and choose how to compute."""


@cache
def is_operator(target: str) -> bool:
    """Whether a graph may call what a target names.

    Example:
        >>> is_operator("torch.ops.aten.add.Tensor"), is_operator("torch.ops.aten.save.default")
        (True, False)
    """
    if _FUNCTION.fullmatch(target):
        return True
    found = _OPERATOR.fullmatch(target)
    if found is None:
        return False
    library, name, overload = found["library"], found["name"], found["overload"]
    if library == "torchvision":
        return name in _VISION
    if name.startswith("__") or (name.startswith("_") and not _INTERNAL.fullmatch(name)):
        return False
    if _REACHES_FURTHER.fullmatch(name) and library == "aten":
        return False
    arguments = operator_arguments(f"{library}::{name}", overload)
    if arguments is None:
        return False
    return all(
        argument in _TEXTS or library == "lightning_qat"
        for argument, kind in arguments
        if "str" in kind
    ) and not any(re.search(r"Storage|Stream|Any|__torch__|\bt\b", kind) for _, kind in arguments)
