"""Compare every number in a ``.tflite`` file with the model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_qat.export.protocol import Array
from lightning_qat.ir.operators import FIXED_OUTPUT_RANGES, fixed_scale_and_zero_point
from lightning_qat.ir.ops import as_fake_quantize
from lightning_qat.ir.quantized_model import QuantizedLayer, QuantizedModel
from lightning_qat.numerics.arithmetic import quantize_bias
from lightning_qat_exporters.tflite.decompose.constant_nodes import fixed_in
from lightning_qat_exporters.tflite.decompose.hardsigmoid import TIMES
from lightning_qat_exporters.tflite.flatbuffer.file import FileTensor, TFLiteFile
from lightning_qat_exporters.tflite.flatbuffer.match_embeddings import tables
from lightning_qat_exporters.tflite.flatbuffer.match_layers import (
    FileLayer,
    match_layers,
    model_qparams,
    same_qparams,
    stored_qparams,
)

_PRESCRIBED = {fixed_scale_and_zero_point(name) for name in FIXED_OUTPUT_RANGES}
"""Output qparams of LOGISTIC, SOFTMAX and TANH; requantized where the model has others."""


def tflite_differences(model: QuantizedModel, file: TFLiteFile) -> tuple[str, ...]:
    """Every integer, scale, zero point and bias in a file that is not the model's, in words.

    A layer is compared by the integers and scales of its weight, the qparams of its input, and its
    bias; an embedding by the integers and scales of its table. All other tensors are compared as a
    set: the file has the model's qparams, and no others but those that LiteRT prescribes.
    """
    found: list[str] = []
    for layer, stored in match_layers(file, model):
        found += (
            f"{layer.name}: {text}" for text in _layer_differences(file, model, layer, stored)
        )
    found += (
        f"{table.key}: no operator of the file has its integers and scales"
        for table, index in tables(file, model)
        if index is None
    )
    computed = [t for t in file.tensors if t.quantized and t.data is None]
    activations = [t for t in model.tensors.values() if t.kind == "activation"]
    fixed = fixed_in(model)
    calls = {n.name: as_fake_quantize(n) for n in model.program.graph.nodes}
    run = {call.key for name, call in calls.items() if call is not None and name not in fixed}
    in_file = {stored_qparams(other) for other in computed}
    in_model = {model_qparams(tensor) for tensor in activations}
    for tensor in (t for t in activations if t.key in run):
        if model_qparams(tensor) not in in_file:
            found.append(f"{tensor.key}: no tensor of the file has its scale and zero point")
    for other in computed:
        qparams = (float(other.scale[0]), int(other.zero_point[0]))
        of_hardsigmoid = replace(other, scale=other.scale / np.float32(TIMES))
        if qparams not in _PRESCRIBED and in_model.isdisjoint(
            map(stored_qparams, (other, of_hardsigmoid))
        ):
            found.append(
                f"the file's tensor {other.name!r} has scale {other.scale.tolist()} and zero "
                f"point {other.zero_point.tolist()}, which no tensor of the model has"
            )
    return tuple(dict.fromkeys(found))


def _layer_differences(
    file: TFLiteFile,
    model: QuantizedModel,
    layer: QuantizedLayer,
    stored: FileLayer | None,
) -> Iterator[str]:
    if stored is None:
        yield "no operator of the file has the integers and scales of its weight"
        return
    source, weight = (model.tensors[key] for key in (layer.input_key, layer.weight_key))
    if stored.source is None or not same_qparams(stored.source, source):
        yield "its input has another scale or zero point in the file"
    if stored.bias is None:
        # Converters leave zeros out.
        if layer.bias is not None and layer.bias.any():
            yield "the file has no bias for it"
        return
    yield from _bias_differences(
        file.tensors[stored.bias], layer, source.qparams.scale, weight.qparams.scale
    )


def _bias_differences(
    stored: FileTensor, layer: QuantizedLayer, scale_input: Tensor, scale_weight: Tensor
) -> Iterator[str]:
    values = stored.data
    if values is None:
        yield "its bias is not a constant in the file"
    elif not stored.quantized:
        expected = np.zeros_like(values) if layer.bias is None else layer.bias.numpy()
        yield from _compare("the float bias", values, expected)
    else:
        # A layer without a bias may have got one of zeros.
        bias = torch.zeros(values.size) if layer.bias is None else layer.bias
        if scale_weight.dim():
            # Those that groups of a transposed convolution share, in models of earlier versions.
            scale_weight = scale_weight.repeat(max(values.size // scale_weight.numel(), 1))
        yield from _compare(
            "the bias", values, quantize_bias(bias, scale_input, scale_weight).numpy()
        )
        step = (scale_input * scale_weight).numpy()
        if stored.zero_point.any() or not np.all(stored.scale == step):
            yield "its bias must have scale s_input * s_weight and zero point 0"


def _compare(what: str, stored: Array, expected: Array) -> Iterator[str]:
    if stored.size != expected.size:
        yield f"{what} has {stored.size} values, the model {expected.size}"
    elif not np.array_equal(stored.reshape(-1), expected.reshape(-1)):
        count = int(np.sum(stored.reshape(-1) != expected.reshape(-1)))
        yield f"{count} of {expected.size} values of {what} differ from the model's"
