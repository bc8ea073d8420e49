"""The table of QAT layers: which float class becomes which QAT class."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_qat.layers import (
    GRUQAT,
    LSTMQAT,
    Conv1dQAT,
    Conv2dQAT,
    Conv3dQAT,
    ConvTranspose1dQAT,
    ConvTranspose2dQAT,
    ConvTranspose3dQAT,
    EmbeddingQAT,
    LinearQAT,
    MultiheadAttentionQAT,
    QATLayer,
)

LAYERS: Mapping[type[nn.Module], type[QATLayer]] = {
    layer.float_class: layer
    for layer in (
        *(Conv1dQAT, Conv2dQAT, Conv3dQAT),
        *(ConvTranspose1dQAT, ConvTranspose2dQAT, ConvTranspose3dQAT),
        *(LinearQAT, EmbeddingQAT, MultiheadAttentionQAT, LSTMQAT, GRUQAT),
    )
}
"""Float layer to QAT layer. A new layer is one class and one entry here."""

_WEIGHT_ONLY = {k.__name__ for k, layer in LAYERS.items() if not layer.quantizes_input}
