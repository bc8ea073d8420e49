"""QDQ files for ONNX Runtime, TensorRT and OpenVINO."""

from lightning_qat_exporters.fake_quant_onnx.exporter import FakeQuantOnnxExporter

__all__ = ["FakeQuantOnnxExporter"]
