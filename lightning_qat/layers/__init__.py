"""QAT layers: a float layer whose input and weight are fake-quantized, one file per family."""

from lightning_qat.layers._layer import WITH_WEIGHTS, QATLayer
from lightning_qat.layers.conv import Conv2dQAT
from lightning_qat.layers.linear import LinearQAT

__all__ = ["WITH_WEIGHTS", "Conv2dQAT", "LinearQAT", "QATLayer"]
