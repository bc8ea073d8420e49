"""The table of layers: a new QAT layer is one class and one row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_qat.layers._layer import QATLayer
from lightning_qat.layers.attention import MultiheadAttentionQAT
from lightning_qat.layers.conv import Conv1dQAT, Conv2dQAT, Conv3dQAT
from lightning_qat.layers.conv_transpose import (
    ConvTranspose1dQAT,
    ConvTranspose2dQAT,
    ConvTranspose3dQAT,
)
from lightning_qat.layers.embedding import EmbeddingQAT
from lightning_qat.layers.linear import LinearQAT
from lightning_qat.layers.own_class import own_class
from lightning_qat.layers.recurrent import GRUQAT, LSTMQAT

_ATEN = torch.ops.aten


class Row(NamedTuple):
    """What the project knows of one layer beside its class.

    Args:
        layer: The QAT class; it names the float class that it quantizes.
        operators: The ATen operators that ``torch.export`` captures the layer as, if a batch norm
            behind them can be folded into the layer's weight.
    """

    layer: type[QATLayer]
    operators: tuple[Any, ...] = ()


TABLE = (
    Row(Conv1dQAT, (_ATEN.conv1d.default, _ATEN.conv1d.padding)),
    Row(Conv2dQAT, (_ATEN.conv2d.default, _ATEN.conv2d.padding)),
    Row(Conv3dQAT, (_ATEN.conv3d.default, _ATEN.conv3d.padding)),
    Row(ConvTranspose1dQAT, (_ATEN.conv_transpose1d.default,)),
    Row(ConvTranspose2dQAT, (_ATEN.conv_transpose2d.input,)),
    Row(ConvTranspose3dQAT, (_ATEN.conv_transpose3d.input,)),
    Row(LinearQAT, (_ATEN.linear.default,)),
    Row(EmbeddingQAT),
    Row(MultiheadAttentionQAT),
    Row(LSTMQAT),
    Row(GRUQAT),
)

_NO_QAT_FORM = (nn.modules.conv._ConvNd, nn.RNNBase, nn.Bilinear, nn.EmbeddingBag)
"""Further layers of torch with weights, and bases of a user's own."""

LAYERS: Mapping[type[nn.Module], type[QATLayer]] = {
    row.layer.float_class: row.layer for row in TABLE
}
"""Float class to QAT class."""


def layer_for(module: nn.Module | None) -> type[QATLayer] | None:
    """The QAT class of a float layer, also of a subclass of the user's; ``None``: there is none."""
    if type(module) is NonDynamicallyQuantizableLinear:
        return None  # a part of nn.MultiheadAttention
    kinds = (
        () if module is None or isinstance(module, QATLayer) else own_class(type(module)).__mro__
    )
    return next((LAYERS[kind] for kind in kinds if kind in LAYERS), None)


WITH_WEIGHTS: tuple[type[nn.Module], ...] = (*LAYERS, *_NO_QAT_FORM)
"""torch's layers with weights: each becomes a QAT layer or is reported as one that does not."""

WEIGHT_ONLY = {kind.__name__ for kind, layer in LAYERS.items() if not layer.quantizes_input}
"""Names of the float classes whose QAT class quantizes no activation."""

CHANNEL_AXES: Mapping[Any, int] = {
    operator: row.layer.channel_axis for row in TABLE for operator in row.operators
}
"""ATen operator of a layer to the output-channel axis of its weight."""
