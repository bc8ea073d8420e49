"""hardsigmoid in integers, with one rounding: ``relu6(x + 3)`` six times as coarse, and a sixth."""

from __future__ import annotations

import torch

from lightning_qat.ir.quantized_model import QuantizedTensor
from lightning_qat_exporters.tflite.decompose.average_pool import constant

TIMES = 6.0
"""The sum is put on the grid of the result with six times its scale, so a sixth is exact there."""


def three(key: str) -> QuantizedTensor:
    """The constant that is added."""
    return constant(key, torch.tensor([127], dtype=torch.int8), 3 / 127)


def sixth(key: str) -> QuantizedTensor:
    """The constant that the sum is multiplied by."""
    return constant(key, torch.tensor([127], dtype=torch.int8), 1 / 6 / 127)
