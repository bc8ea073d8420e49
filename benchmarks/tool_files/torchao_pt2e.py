"""torchao's PT2E: the captured program, prepared for training and converted."""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from benchmarks.tool_files.nets import batches, nets
from benchmarks.tool_files.tool import Write


def files() -> Iterator[tuple[str, Write]]:
    """Every net, trained and only calibrated."""
    for name, net, x in nets():
        for qat in (True, False):
            yield f"{name}_{'qat' if qat else 'ptq'}", partial(_quantize, net, x, qat)


def _quantize(net: nn.Module, x: Tensor, qat: bool, path: Path) -> None:
    net = copy.deepcopy(net).train(qat)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=qat))
    prepare: Any = prepare_qat_pt2e if qat else prepare_pt2e
    model = prepare(torch.export.export(net, (x,), strict=True).module(), quantizer)
    with torch.no_grad():
        for batch in batches(x):
            model(batch)
    model = convert_pt2e(model)
    move_exported_model_to_eval(model)
    torch.onnx.export(model, (x,), path, opset_version=21, dynamo=True, verbose=False)
