"""Deploy files for Huawei Ascend, and the NumPy executor that runs them."""

from lightning_qat_exporters.cann.executor.executor import AscendExecutor
from lightning_qat_exporters.cann.exporter import CannExporter

__all__ = ["CannExporter", "AscendExecutor"]
