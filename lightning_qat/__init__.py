"""Quantization-aware training for PyTorch Lightning, exported to every target with proof."""

from typing import TYPE_CHECKING, Any

from lightning_qat.apply_record import apply_record
from lightning_qat.checkpoint import load_qat_checkpoint, strip_quantizers
from lightning_qat.convert import CaptureError, convert
from lightning_qat.export import Artifact, UnsupportedByTarget, export
from lightning_qat.learned_quantizers import quantizer_parameters
from lightning_qat.prepare import PrepareReport, prepare
from lightning_qat.qat_model import Conversion, convert_qat_model
from lightning_qat.quantized_model import QuantizedModel
from lightning_qat.recipe import ActivationSpec, Recipe, WeightSpec
from lightning_qat.record import read_record
from lightning_qat.schedule import Schedule
from lightning_qat.verify import Agreement, verify

if TYPE_CHECKING:
    from lightning_qat.callback import QATCallback

__all__ = [
    "QATCallback",
    "Recipe",
    "WeightSpec",
    "ActivationSpec",
    "Schedule",
    "prepare",
    "PrepareReport",
    "convert",
    "QuantizedModel",
    "CaptureError",
    "export",
    "Artifact",
    "UnsupportedByTarget",
    "verify",
    "Agreement",
    "convert_qat_model",
    "Conversion",
    "read_record",
    "apply_record",
    "load_qat_checkpoint",
    "strip_quantizers",
    "quantizer_parameters",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; the command line and the functions do without it.
    if name == "QATCallback":
        from lightning_qat.callback import QATCallback

        return QATCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
