"""The functions of Huawei AMCT's PyTorch QAT, by its names, and its record file."""

from lightning_qat.amct.retrain import (
    create_quant_retrain_config,
    create_quant_retrain_model,
    restore_quant_retrain_model,
    save_quant_retrain_model,
)
from lightning_qat.export.convert_onnx import convert_qat_model

__all__ = [
    "convert_qat_model",
    "create_quant_retrain_config",
    "create_quant_retrain_model",
    "restore_quant_retrain_model",
    "save_quant_retrain_model",
]
