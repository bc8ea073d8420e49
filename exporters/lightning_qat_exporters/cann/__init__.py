"""Deploy files for Huawei Ascend, and two ways to run them: NumPy, ONNX Runtime."""

from lightning_qat_exporters.cann.executor.executor import AscendExecutor
from lightning_qat_exporters.cann.exporter import CannExporter

__all__ = ["CannExporter", "AscendExecutor"]
