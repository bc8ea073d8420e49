"""The modules that observe, fake-quantize and learn; their final forms."""

from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.factory import (
    activation_quantizer,
    quantizer_parameters,
    weight_quantizer,
)
from lightning_qat.quantizers.weight import WeightQuantizer

__all__ = [
    "Quantizer",
    "ActivationQuantizer",
    "WeightQuantizer",
    "activation_quantizer",
    "weight_quantizer",
    "quantizer_parameters",
]
