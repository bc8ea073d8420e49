"""Store biases of layers with 16-bit inputs as int64, as LiteRT's specification demands."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_qat_exporters.tflite.flatbuffer.file import kind_of, schema

_LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def widen_biases(file: Any) -> None:
    """Change int32 biases of layers with 16-bit inputs to int64, in an unpacked file, in place.

    litert-torch writes int32, which DEPTHWISE_CONV_2D refuses and the reference kernel of
    FULLY_CONNECTED misreads.
    """
    s, graph = schema(), file.subgraphs[0]
    types = s.TensorType
    for operator in graph.operators:
        if kind_of(file, operator) not in _LAYERS or len(operator.inputs) < 3:
            continue
        source, bias = (graph.tensors[operator.inputs[index]] for index in (0, 2))
        if source.type == types.INT16 and bias.type == types.INT32:
            narrow = np.asarray(file.buffers[bias.buffer].data, np.uint8).view(np.int32)
            wide = s.BufferT()
            wide.data = narrow.astype(np.int64).view(np.uint8)
            file.buffers.append(wide)
            bias.type, bias.buffer = types.INT64, len(file.buffers) - 1
