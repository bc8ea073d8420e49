"""torch.ao's FX mode: converted networks, and fake quantizers of its first version."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.fx import GraphModule

from benchmarks.tool_files.nets import batches, nets
from benchmarks.tool_files.tool import Write

ao: Any = quantization  # not typed


def files() -> Iterator[tuple[str, Write]]:
    """Every net by every backend's settings."""
    for name, net, x in nets():
        for backend in ("fbgemm", "x86", "qnnpack"):
            yield f"{name}_{backend}", partial(_converted, net, x, backend)
        yield f"{name}_fake", partial(_fake, net, x)


def _prepared(net: nn.Module, x: Tensor, mapping: Any) -> GraphModule:
    model: GraphModule = prepare_qat_fx(copy.deepcopy(net).train(), mapping, (x,))
    with torch.no_grad():
        for batch in batches(x):
            model(batch)
    model.eval()
    return model


def _converted(net: nn.Module, x: Tensor, backend: str, path: Path) -> None:
    """Integers and their operators, which the exporter writes as pairs."""
    model = convert_fx(_prepared(net, x, ao.get_default_qat_qconfig_mapping(backend)))
    torch.onnx.export(model, (x,), path, opset_version=17, dynamo=False)


def _fake(net: nn.Module, x: Tensor, path: Path) -> None:
    """Fake quantizers as they stand; those of the later, fused version have no ONNX form."""
    mapping = ao.get_default_qat_qconfig_mapping("x86", version=0)
    model = _prepared(net, x, mapping).apply(ao.disable_observer)
    torch.onnx.export(model, (x,), path, opset_version=17, dynamo=False)
