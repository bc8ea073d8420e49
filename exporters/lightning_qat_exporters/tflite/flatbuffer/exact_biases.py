"""Give a file the model's own integers for biases, where a converter rounded them otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.arithmetic import quantize_bias
from lightning_qat_exporters.tflite.flatbuffer.file import schema, view
from lightning_qat_exporters.tflite.flatbuffer.match_layers import MatchedLayers, same_qparams

_FLOAT32 = 2.0**-22
"""A step that is the product of two scales in float32 may be off by so much of itself."""


def store_biases(file: Any, model: QuantizedModel, layers: MatchedLayers) -> None:
    """Write ``round(bias / (s_input * s_weight))`` as the model rounds it, in place.

    Converters take the product of the scales in double precision, the model in float32: a bias near
    the middle of two steps is one off, a bias of many steps more. A bias that is one number for all
    channels (a detector's prior, a forget gate's 1) litert-torch divides by the scale of the first
    channel alone. What is further off than that is left for ``read_back`` to report, for then the
    file has another bias.

    Args:
        file: An unpacked file; changed in place.
        model: The model that it is made of.
        layers: The model's layers in the file.
    """
    plain, s = view(file), schema()
    for layer, stored in layers:
        if stored is None or stored.bias is None or stored.source is None or layer.bias is None:
            continue
        source, weight = (model.tensors[key] for key in (layer.input_key, layer.weight_key))
        found = plain.tensors[stored.bias]
        if found.type != "INT32" or found.data is None or not same_qparams(stored.source, source):
            continue
        scale = weight.qparams.scale
        if scale.dim():
            # Groups of a transposed convolution share them, in models of earlier versions.
            scale = scale.repeat(max(len(layer.bias) // scale.numel(), 1))
        exact = quantize_bias(layer.bias, source.qparams.scale, scale).numpy()
        values = found.data.reshape(-1).astype(np.int64)
        if exact.shape != values.shape or np.array_equal(exact, values):
            continue
        # What the converter makes of a bias that is one number.
        expected = (
            np.full_like(exact, exact[0]) if bool((layer.bias == layer.bias[0]).all()) else exact
        )
        if not any(_is_near(values, wanted) for wanted in (exact, expected)):
            continue
        # A buffer of its own: tensors of equal content share theirs.
        buffer = s.BufferT()
        buffer.data = exact.astype(np.int32).view(np.uint8)
        file.buffers.append(buffer)
        file.subgraphs[0].tensors[stored.bias].buffer = len(file.buffers) - 1


def _is_near(values: Any, wanted: Any) -> bool:
    """Whether stored integers are those wanted but for the converter's rounding."""
    return bool(np.all(np.abs(wanted - values) <= 1 + np.abs(wanted) * _FLOAT32))
