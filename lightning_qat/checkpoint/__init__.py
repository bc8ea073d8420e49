"""Read the quantization that a checkpoint holds, and load a checkpoint without a Trainer."""

from lightning_qat.checkpoint.load import load_qat_checkpoint, strip_quantizers

__all__ = ["load_qat_checkpoint", "strip_quantizers"]
