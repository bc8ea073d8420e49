"""From a trained QAT model to final numbers in one captured graph."""

from lightning_qat.convert.capture import CaptureError
from lightning_qat.convert.convert import check_capture, convert

__all__ = ["convert", "check_capture", "CaptureError"]
