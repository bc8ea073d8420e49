"""``scaled_dot_product_attention`` as what it is: two matrix products and a softmax between them.

torch computes it in one function, inside which no operand can be quantized. Here the same function
is written out, as torch documents it, and each operand of a product passes a quantizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.function_hooks.quantizer_protocol import InputQuantizer
from lightning_qat.ir.operators import FIXED_OUTPUT_RANGES
from lightning_qat.numerics.int_repr import saving_int_repr

FUSED_ATTENTION: Callable[..., Tensor] = F.scaled_dot_product_attention
SCORES, WEIGHTS = 3, 4
"""Operand numbers, behind query, key and value: what the softmax reads, and what it gives."""

WEIGHTS_RANGE = FIXED_OUTPUT_RANGES["softmax"]

Quantize = Callable[[int, Tensor], Tensor]
"""Given an operand number and a tensor: what is read instead of the tensor."""


class AttentionCall(NamedTuple):
    """The arguments of one call, with torch's names, order and defaults."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def attention_arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with query, key and value by position, and the others by name."""
    tensors, others = list(args[:3]), dict(kwargs)
    for name in AttentionCall._fields[len(tensors) : 3]:
        if name not in others:
            return args, others  # for torch to refuse
        tensors.append(others.pop(name))
    others.update(zip(AttentionCall._fields[3:], args[3:], strict=False))
    return tuple(tensors), others


def attend(
    *args: Any,
    quantize: Quantize,
    show_masked: Callable[[Tensor], object] | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""Attend as ``torch.nn.functional.scaled_dot_product_attention`` does, step by step.

    With :math:`d` features and the mask :math:`M` (0 or :math:`-\infty`, or any float mask)

    .. math:: a = \mathrm{softmax}(q k^T / \sqrt d + M), \qquad y = a v

    ``quantize`` gets :math:`a` before dropout, as the exported softmax gives it, and without a mask
    the scores that the softmax reads. With one the softmax reads float, for minus infinity is on no
    grid. A query that may attend to nothing gets zeros, as in torch.

    Args:
        *args: Those of torch's function; query, key and value are quantized already.
        quantize: Called with ``SCORES`` and ``WEIGHTS``.
        show_masked: Called with scores that get a mask: another call may have none, and needs their
            range.
        **kwargs: Those of torch's function.

    Returns:
        ``(..., heads, target length, features of the value)``.
    """
    call = AttentionCall(*args, **kwargs)
    query, key, value = call[:3]
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = _product(query, key.transpose(-2, -1), call.enable_gqa) * scale
    half = scores.dtype in (torch.float16, torch.bfloat16)
    if half:
        scores = scores.float()  # as torch's own kernels do
    mask = _mask(call, scores)
    if mask is None:
        weights = F.softmax(quantize(SCORES, scores), -1)
    else:
        if show_masked is not None:
            show_masked(scores)
        weights = masked_softmax(scores, mask, may_mask_all=call.attn_mask is not None)
    weights = quantize(WEIGHTS, weights)
    if call.dropout_p > 0.0:
        weights = torch.dropout(weights, call.dropout_p, True)
    if half:
        weights = weights.to(value.dtype)
    return _product(weights, value, call.enable_gqa)


def _product(a: Tensor, b: Tensor, grouped: bool) -> Tensor:
    """``a @ b``; several heads of ``a`` in a row may share one of ``b``, which is not repeated."""
    heads, shared = (a.shape[-3], b.shape[-3]) if grouped else (1, 1)
    with saving_int_repr(a, b):
        if heads == shared:
            return torch.matmul(a, b)
        rows = (shared, heads // shared * a.shape[-2])
        product = torch.matmul(a.reshape(*a.shape[:-3], *rows, a.shape[-1]), b)
        return product.reshape(*product.shape[:-3], *a.shape[-3:-1], product.shape[-1])


def _mask(call: AttentionCall, scores: Tensor) -> Tensor | None:
    """What is added to the scores, broadcastable to them: 0, minus infinity, or a float mask."""
    mask = call.attn_mask
    variant = None if mask is None or type(mask) is Tensor else getattr(mask, "variant", None)
    if variant is not None:
        # torch.nn.attention.bias.CausalBias, a mask without elements. Importing it takes seconds.
        target, source = scores.shape[-2:]
        mask = _later(scores, source - target if variant.name == "LOWER_RIGHT" else 0)
    elif mask is not None and mask.dtype == torch.bool:
        mask = _minus_infinity(scores, mask.logical_not())
    if call.is_causal:
        later = _later(scores, 0)
        mask = later if mask is None else mask + later
    return mask


def _later(scores: Tensor, offset: int) -> Tensor:
    """Minus infinity where a key stands later than the query, which is moved by an offset."""
    target, source = scores.shape[-2:]
    keys, queries = (torch.arange(n, device=scores.device) for n in (source, target))
    return _minus_infinity(scores, keys > (queries + offset).unsqueeze(-1))


def _minus_infinity(like: Tensor, where: Tensor) -> Tensor:
    return like.new_zeros(where.shape).masked_fill(where, -math.inf)


def masked_softmax(scores: Tensor, mask: Tensor, *, may_mask_all: bool = True) -> Tensor:
    """The softmax of ``scores + mask`` over the last axis; zeros where all of it is masked.

    Args:
        scores: Real values.
        mask: What is added to them; minus infinity leaves a value out.
        may_mask_all: Whether the mask may leave out all values of a row.
    """
    if not may_mask_all:
        return F.softmax(scores + mask, -1)
    nothing = (mask == -math.inf).all(-1, keepdim=True)
    weights = F.softmax(scores + mask.masked_fill(nothing, 0.0), -1)
    return weights.masked_fill(nothing, 0.0)


def attention_function(
    operands: Mapping[int, InputQuantizer], fused: Callable[..., Any]
) -> Callable[..., Any]:
    """What computes a planned call whose query, key and value are quantized already.

    Args:
        operands: Operand number to quantizer.
        fused: torch's function. It is taken where there is nothing to quantize inside: no quantizer
            works now, or the plan is one of an earlier version, which knew none.
    """
    inner = {n: operands[n] for n in (SCORES, WEIGHTS) if n in operands}
    if all(quantizer.idle for quantizer in inner.values()):
        return fused
    return partial(
        attend,
        quantize=lambda n, x: inner[n](x) if n in inner else x,
        show_masked=inner.get(SCORES),
    )
