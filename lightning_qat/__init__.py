"""Quantization-aware training for PyTorch Lightning, and exports that are compared with the model.

An exported file is read back and its scales and integers are compared with the converted model's;
where the target has a runtime, outputs are compared too. The runtime for Huawei Ascend is this
package's own reference executor: neither a device nor ATC has seen the files.
"""

from typing import TYPE_CHECKING, Any

from lightning_qat.amct.apply_record import apply_record
from lightning_qat.amct.record import read_record
from lightning_qat.checkpoint.load import load_qat_checkpoint, strip_quantizers
from lightning_qat.convert.capture import CaptureError
from lightning_qat.convert.convert import convert
from lightning_qat.export.convert_onnx import Conversion, convert_qat_model
from lightning_qat.export.export import export
from lightning_qat.export.protocol import Artifact, UnsupportedByTarget
from lightning_qat.export.verify import Agreement, verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.quantizers.factory import quantizer_parameters
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.schedule import Schedule
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec
from lightning_qat.training.weights_once import weights_quantized_once

if TYPE_CHECKING:
    from lightning_qat.callback.qat_callback import QATCallback

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
    "weights_quantized_once",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; the command line and the functions do without it.
    if name == "QATCallback":
        from lightning_qat.callback.qat_callback import QATCallback

        return QATCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
