"""QAT layers: a float layer whose input and weight are fake-quantized, one file per family."""

from lightning_qat.layers._layer import QATLayer
from lightning_qat.layers.attention import MultiheadAttentionQAT, OutputProjectionQAT
from lightning_qat.layers.conv import Conv1dQAT, Conv2dQAT, Conv3dQAT
from lightning_qat.layers.conv_transpose import (
    ConvTranspose1dQAT,
    ConvTranspose2dQAT,
    ConvTranspose3dQAT,
)
from lightning_qat.layers.embedding import EmbeddingQAT
from lightning_qat.layers.linear import LinearQAT
from lightning_qat.layers.recurrent import GRUQAT, LSTMQAT
from lightning_qat.layers.table import WITH_WEIGHTS
from lightning_qat.quantizers.names import quantizer_role, weight_quantizer_name

__all__ = [
    "WITH_WEIGHTS",
    "Conv1dQAT",
    "Conv2dQAT",
    "Conv3dQAT",
    "ConvTranspose1dQAT",
    "ConvTranspose2dQAT",
    "ConvTranspose3dQAT",
    "LinearQAT",
    "EmbeddingQAT",
    "MultiheadAttentionQAT",
    "OutputProjectionQAT",
    "LSTMQAT",
    "GRUQAT",
    "QATLayer",
    "quantizer_role",
    "weight_quantizer_name",
]
