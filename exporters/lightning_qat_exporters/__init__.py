"""Exporters of lightning-qat: one folder per target, found through entry points."""

from lightning_qat_exporters.cann import CannExporter
from lightning_qat_exporters.fake_quant_onnx import FakeQuantOnnxExporter
from lightning_qat_exporters.tflite import TFLiteExporter

__all__ = ["CannExporter", "FakeQuantOnnxExporter", "TFLiteExporter"]
