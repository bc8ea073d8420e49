"""Brevitas: its layers in place of torch's, exported by ``export_onnx_qcdq``."""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas import quant
from brevitas.export import export_onnx_qcdq
from torch import Tensor, nn

from benchmarks.tool_files.nets import batches, nets
from benchmarks.tool_files.tool import Write

_LAYERS = {
    getattr(nn, name): getattr(qnn, f"Quant{name}")
    for name in ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "Linear")
}
_SIZES = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("output_padding", "in_features", "out_features"),
)


def _bits(bits: int) -> dict[str, Any]:
    return {
        "weight_quant": quant.Int8WeightPerChannelFloat,
        "weight_bit_width": bits,
        "input_quant": quant.Int8ActPerTensorFloat,
        "input_bit_width": bits,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    **{f"{bits}_bits": _bits(bits) for bits in (8, 7)},
    "tensor": {"weight_quant": quant.Int8WeightPerTensorFloat, "input_quant": None},
    "shifted": {
        "weight_quant": quant.ShiftedUint8WeightPerTensorFloat,
        "input_quant": quant.ShiftedUint8ActPerTensorFloat,
    },
    "biases": {**_bits(8), "bias_quant": quant.Int32Bias},
    "outputs": {**_bits(8), "output_quant": quant.Int8ActPerTensorFloat},
}
FEW_BITS: dict[str, dict[str, Any]] = {f"{bits}_bits": _bits(bits) for bits in (4, 2)}


def files(options_by_tag: dict[str, dict[str, Any]] = OPTIONS) -> Iterator[tuple[str, Write]]:
    """Every net with every set of options."""
    for name, net, x in nets():
        for tag, options in options_by_tag.items():
            yield f"{name}_{tag}", partial(_quantize, net, x, options)


def _quantize(net: nn.Module, x: Tensor, options: dict[str, Any], path: Path) -> None:
    model = copy.deepcopy(net)
    for name, layer in list(model.named_modules()):
        new = _layer(layer, options)
        if new is not None:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, new)
    if options["input_quant"] is None:
        # Grids of their own in front of the net and behind each activation.
        model = nn.Sequential(qnn.QuantIdentity(return_quant_tensor=True), model)
    with torch.no_grad():
        for batch in batches(x):
            model.train()(batch)
    export_onnx_qcdq(model.eval(), args=x, export_path=str(path), opset_version=17, dynamo=False)


def _layer(layer: nn.Module, options: dict[str, Any]) -> nn.Module | None:
    """What Brevitas has in place of a layer; ``None``: it stays."""
    new: nn.Module
    if type(layer) in _LAYERS:
        sizes = {name: getattr(layer, name) for name in _SIZES if hasattr(layer, name)}
        if "output_padding" in sizes and "Transpose" not in type(layer).__name__:
            del sizes["output_padding"]
        new = _LAYERS[type(layer)](**sizes, bias=layer.bias is not None, **options)
        new.load_state_dict(layer.state_dict(), strict=False)
        return new
    if isinstance(layer, nn.ReLU | nn.ReLU6) and options["input_quant"] is None:
        new = qnn.QuantReLU(return_quant_tensor=True)
        return new
    return None
