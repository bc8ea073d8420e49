"""Quantization-aware training for PyTorch Lightning, and exports that are compared with the model.

An exported file is read back and its scales and integers are compared with the converted model's;
where the target has a runtime, outputs are compared too. The runtime for Huawei Ascend is this
package's own reference executor: neither a device nor ATC has seen the files.

A name is loaded when it is first used: the command line does without torch, and all but
``QATCallback`` without Lightning.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_qat.amct.apply_record import apply_record
    from lightning_qat.amct.record import read_record
    from lightning_qat.calibrate.calibrate import calibrate
    from lightning_qat.callback.qat_callback import QATCallback
    from lightning_qat.checkpoint.load import load_qat_checkpoint, strip_quantizers
    from lightning_qat.convert.capture import CaptureError
    from lightning_qat.convert.convert import convert
    from lightning_qat.export.compare.comparison import Comparison
    from lightning_qat.export.convert_onnx import Conversion, convert_qat_model
    from lightning_qat.export.export import export
    from lightning_qat.export.protocol import Artifact, UnsupportedByTarget
    from lightning_qat.export.verify import Agreement, verify
    from lightning_qat.insight.calibration_study import CalibrationStudy, calibration_study
    from lightning_qat.insight.compare import compare
    from lightning_qat.insight.sensitivity.result import Sensitivity
    from lightning_qat.insight.sensitivity.sensitivity import sensitivity
    from lightning_qat.insight.sensitivity.suggest import BudgetNotMet, Suggestion, suggest
    from lightning_qat.ir.quantized_model import QuantizedModel
    from lightning_qat.prepare.prepare import prepare
    from lightning_qat.prepare.report import PrepareReport
    from lightning_qat.quantizers.factory import quantizer_parameters
    from lightning_qat.recipe.recipe import Recipe
    from lightning_qat.recipe.schedule import Schedule
    from lightning_qat.recipe.specs import ActivationSpec, WeightSpec
    from lightning_qat.training.calibrate_unseen import calibrate_unseen
    from lightning_qat.training.weights_once import weights_quantized_once

__all__ = [
    "QATCallback",
    "Recipe",
    "WeightSpec",
    "ActivationSpec",
    "Schedule",
    "prepare",
    "PrepareReport",
    "calibrate",
    "convert",
    "QuantizedModel",
    "CaptureError",
    "export",
    "Artifact",
    "UnsupportedByTarget",
    "verify",
    "Agreement",
    "compare",
    "Comparison",
    "convert_qat_model",
    "Conversion",
    "read_record",
    "apply_record",
    "load_qat_checkpoint",
    "strip_quantizers",
    "quantizer_parameters",
    "weights_quantized_once",
    "calibrate_unseen",
    "sensitivity",
    "Sensitivity",
    "suggest",
    "Suggestion",
    "BudgetNotMet",
    "calibration_study",
    "CalibrationStudy",
]

_DEFINED_IN = {
    "QATCallback": "callback.qat_callback",
    "Recipe": "recipe.recipe",
    "WeightSpec": "recipe.specs",
    "ActivationSpec": "recipe.specs",
    "Schedule": "recipe.schedule",
    "prepare": "prepare.prepare",
    "PrepareReport": "prepare.report",
    "calibrate": "calibrate.calibrate",
    "convert": "convert.convert",
    "QuantizedModel": "ir.quantized_model",
    "CaptureError": "convert.capture",
    "export": "export.export",
    "Artifact": "export.protocol",
    "UnsupportedByTarget": "export.protocol",
    "verify": "export.verify",
    "Agreement": "export.verify",
    "compare": "insight.compare",
    "Comparison": "export.compare.comparison",
    "convert_qat_model": "export.convert_onnx",
    "Conversion": "export.convert_onnx",
    "read_record": "amct.record",
    "apply_record": "amct.apply_record",
    "load_qat_checkpoint": "checkpoint.load",
    "strip_quantizers": "checkpoint.load",
    "quantizer_parameters": "quantizers.factory",
    "weights_quantized_once": "training.weights_once",
    "calibrate_unseen": "training.calibrate_unseen",
    "sensitivity": "insight.sensitivity.sensitivity",
    "Sensitivity": "insight.sensitivity.result",
    "suggest": "insight.sensitivity.suggest",
    "Suggestion": "insight.sensitivity.suggest",
    "BudgetNotMet": "insight.sensitivity.suggest",
    "calibration_study": "insight.calibration_study",
    "CalibrationStudy": "insight.calibration_study",
}
"""Public name to the module that defines it."""


def __getattr__(name: str) -> Any:
    if name in _DEFINED_IN:
        found = getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
        setattr(sys.modules[__name__], name, found)
        return found
    # ``import lightning_qat`` alone has always given lightning_qat.layers.
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Door(ModuleType):
    """Keeps the functions ``convert``, ``export`` and ``prepare`` before the packages they are in.

    Importing a package sets it as an attribute of the one around it.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _DEFINED_IN or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door
