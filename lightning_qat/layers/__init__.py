"""QAT layers: a float layer whose input and weight are fake-quantized, one file per family."""

from lightning_qat.layers._layer import QATLayer
from lightning_qat.layers.conv import Conv2dQAT
from lightning_qat.layers.linear import LinearQAT

__all__ = ["Conv2dQAT", "LinearQAT", "QATLayer"]
