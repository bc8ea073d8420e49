"""NVIDIA ModelOpt in FP8, which no integer target computes."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import modelopt.torch.quantization as mtq

from benchmarks.tool_files.modelopt_torch import quantized_file
from benchmarks.tool_files.nets import nets
from benchmarks.tool_files.tool import Write


def files() -> Iterator[tuple[str, Write]]:
    """Nets with convolutions and with Linear layers."""
    for name, net, x in nets():
        if name in ("residual", "mlp", "attention"):
            yield name, partial(quantized_file, net, x, mtq.FP8_DEFAULT_CFG)
