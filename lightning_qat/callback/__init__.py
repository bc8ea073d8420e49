"""The one door to Lightning: a Trainer's hooks translated into calls of the rooms below."""

from lightning_qat.callback.qat_callback import QATCallback

__all__ = ["QATCallback"]
