"""NVIDIA ModelOpt's torch quantization, 8-bit integers."""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn

from benchmarks.tool_files.nets import batches, nets
from benchmarks.tool_files.tool import Write


def files() -> Iterator[tuple[str, Write]]:
    """Every net with the configuration that the documents name."""
    for name, net, x in nets():
        yield name, partial(quantized_file, net, x, mtq.INT8_DEFAULT_CFG)


def quantized_file(net: nn.Module, x: Tensor, config: Any, path: Path) -> None:
    """Calibrate and export."""

    def run(model: nn.Module) -> None:
        for batch in batches(x):
            model(batch)

    model = mtq.quantize(copy.deepcopy(net), config, run)
    torch.onnx.export(model, (x,), path, opset_version=17, dynamo=False)
