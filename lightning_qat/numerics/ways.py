"""The way in which quantizers run on a device, in words."""

from __future__ import annotations

import torch

from lightning_qat.numerics.gpu.launch import why_not
from lightning_qat.numerics.kernels import loops


def way_on(device: torch.device) -> str:
    """The way in which quantizers run on a device, in words for a log; why it is no faster one.

    Compiles the loops of a CPU, and launches a first kernel on a GPU.
    """
    if device.type == "cpu":
        return loops.backend_name()
    reason = why_not(device)
    if reason is None:
        return "Triton kernels"
    return f"operations of torch on {device}, with the same numbers but slower: {reason}"
