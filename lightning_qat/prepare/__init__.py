"""Turn a float model into a QAT model, in place, and report what was changed."""

from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.prepare_like import prepare_like
from lightning_qat.prepare.report import PrepareReport, SkippedLayer, SwappedLayer

__all__ = ["prepare", "prepare_like", "PrepareReport", "SwappedLayer", "SkippedLayer"]
