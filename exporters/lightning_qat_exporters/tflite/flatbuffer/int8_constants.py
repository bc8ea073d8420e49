"""Store weights as int8 that litert-torch's converter wrote as float32.

If a layer is computed in float, the converter keeps the weight of a convolution as int8 behind
DEQUANTIZE, but writes those of FULLY_CONNECTED and CONV_3D_TRANSPOSE and the tables of embeddings
as float32: four times the bytes for the same numbers. LiteRT dequantizes a constant once, when it
prepares the file.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.tflite.decompose.conv_transpose import dense_scale
from lightning_qat_exporters.tflite.flatbuffer.file import insert_operator, schema, view
from lightning_qat_exporters.tflite.flatbuffer.match_embeddings import tables
from lightning_qat_exporters.tflite.flatbuffer.match_layers import MatchedLayers

_CHANNELS = {"FULLY_CONNECTED": 0, "CONV_3D_TRANSPOSE": 3}
"""The axis of output channels in a stored weight."""


def store_integers(file: Any, model: QuantizedModel, layers: MatchedLayers) -> MatchedLayers:
    """Replace every float constant that holds a model's weight by its integers and DEQUANTIZE.

    Args:
        file: An unpacked file; changed in place.
        model: The model that it is made of.
        layers: The model's layers in the file.

    Returns:
        The same layers; ``weight`` is now the index of the integers.
    """
    plain, moved = view(file), dict[int, int]()
    for layer, stored in layers:
        if stored is None or stored.weight in moved or stored.operator.kind not in _CHANNELS:
            continue
        values, axis = plain.tensors[stored.weight], _CHANNELS[stored.operator.kind]
        if values.quantized or values.data is None:
            continue
        qparams = model.tensors[layer.weight_key].qparams
        scale = dense_scale(qparams, values.shape[axis]).numpy().reshape(-1)
        shape = [-1 if place == axis else 1 for place in range(values.data.ndim)]
        # Exact: the values are products of the integers and the scale.
        integers = np.rint(values.data / scale.reshape(shape)).astype(np.int8)
        moved[stored.weight] = _dequantized(file, stored.weight, integers, scale, axis)
    for table, index in tables(plain, model):
        if index is None or index in moved or plain.tensors[index].quantized:
            continue
        assert table.integers is not None
        scale = table.qparams.scale.numpy().reshape(-1)
        integers = table.integers.numpy().astype(np.int8)
        moved[index] = _dequantized(file, index, integers, scale, 0)
    return tuple(
        (layer, None if at is None else replace(at, weight=moved.get(at.weight, at.weight)))
        for layer, at in layers
    )


def _dequantized(file: Any, index: int, integers: Any, scale: Any, axis: int) -> int:
    """Make a float constant the output of a DEQUANTIZE; return the index of its integers."""
    s, graph = schema(), file.subgraphs[0]
    real = graph.tensors[index]
    tensor, quantization, buffer = copy.copy(real), s.QuantizationParametersT(), s.BufferT()
    quantization.scale, quantization.zeroPoint = scale, np.zeros(scale.size, np.int64)
    quantization.quantizedDimension = axis if scale.size > 1 else 0
    buffer.data = integers.reshape(-1).view(np.uint8)
    file.buffers.append(buffer)
    tensor.name, tensor.type, tensor.quantization = (
        real.name + b"_integers",
        s.TensorType.INT8,
        quantization,
    )
    tensor.buffer = len(file.buffers) - 1
    graph.tensors.append(tensor)
    if sum(other.buffer == real.buffer for other in graph.tensors) == 1:
        file.buffers[real.buffer].data = None
    # The first buffer is the empty one, of tensors that are computed.
    real.buffer = 0
    new = len(graph.tensors) - 1
    insert_operator(file, 0, "DEQUANTIZE", new, index)
    return new
