"""Let biases fit the 32 bits that integer targets give them."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lightning_qat.ir.exported_program import Constants
from lightning_qat.ir.ops import as_dequantize, as_fake_quantize, layer_of_weight_key
from lightning_qat.layers.table import CHANNEL_AXES
from lightning_qat.numerics.arithmetic import along_channels

_INT32_MAX = 2**31 - 1
_AIM = 2.0**30
"""Steps of a bias that is made to fit: half of int32 is left to what is added to it."""


def fit_biases(program: ExportedProgram) -> None:
    """Coarsen the weights of channels whose bias has more than ``2**31 - 1`` steps, in place.

    Integer targets store a bias in steps of ``input scale * weight scale``. A channel whose weights
    are all but zero (a residual branch that starts at ``gamma = 0``) has a weight scale so small
    that its bias does not fit. Its scale becomes ``|bias| / (input scale * 2**30)``, its integers
    are rounded anew: each product changes by less than ``2**-31 * 256`` of the bias. ONNX Runtime's
    quantizer does the same.

    Warns:
        UserWarning: Names every such layer.
    """
    constants = Constants(program)
    calls = [as_dequantize(node) for node in program.graph.nodes if node.users]
    uses = Counter(call.key for call in calls if call is not None)
    for node in list(program.graph.nodes):
        call = as_dequantize(node.args[1]) if node.target in CHANNEL_AXES else None
        source = as_fake_quantize(node.args[0]) if call is not None else None
        bias = constants.value(node.args[2]) if source and len(node.args) > 2 else None
        if call is None or source is None or bias is None or call.axis is None:
            continue
        integers, scale = constants.value(call.integers), constants.value(call.scale)
        input_scale = constants.value(source.scale)
        if integers is None or scale is None or input_scale is None or scale.shape != bias.shape:
            continue
        size = bias.double().abs()
        over = size > _INT32_MAX * (input_scale * scale).double()
        if not over.any() or uses[call.key] > 1:
            continue
        wider = torch.where(over, (size / (_AIM * input_scale.double())).float(), scale)
        fewer = _on(wider, integers, scale, call.axis)
        _replace(node.args[1], constants, fewer, wider)
        warnings.warn(
            f"{layer_of_weight_key(call.key)}: the weights of {int(over.sum())} of "
            f"{over.numel()} channels are so small that their biases would not fit int32; they "
            "are stored on a coarser grid.",
            stacklevel=3,
        )


def _on(wider: Tensor, integers: Tensor, scale: Tensor, axis: int) -> Tensor:
    ratio = along_channels(scale.double() / wider.double(), integers.shape, axis)
    return torch.round(integers.double() * ratio).to(integers.dtype)


def _replace(weight: fx.Node, constants: Constants, integers: Tensor, scale: Tensor) -> None:
    """Give a weight other integers and scales."""
    call: Any = as_dequantize(weight)
    weight.args = call._replace(
        integers=constants.add(f"{call.key}.fitted_integers", integers),
        scale=constants.add(f"{call.key}.fitted_scale", scale),
    ).args
