"""Which tensors of a converted model a ``.tflite`` file computes with as integers."""

from __future__ import annotations

from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.tflite.flatbuffer.file import TFLiteFile
from lightning_qat_exporters.tflite.flatbuffer.match_layers import (
    MatchedLayers,
    model_qparams,
    stored_qparams,
)

_ONLY_CARRY = frozenset(
    "QUANTIZE DEQUANTIZE RESHAPE TRANSPOSE SQUEEZE EXPAND_DIMS SLICE STRIDED_SLICE SPLIT SPLIT_V "
    "UNPACK BROADCAST_TO TILE".split()
)
"""Operators that hand values on, from integers to integers."""


def integer_keys(model: QuantizedModel, file: TFLiteFile, layers: MatchedLayers) -> frozenset[str]:
    """Keys of the weights of integer layers, and of activations that other operators read so.

    A file keeps no names, so an activation, which may be a constant, is known by its scale and
    zero point.
    """
    in_float = set(file.float_operators)
    found = {
        layer.weight_key
        for layer, stored in layers
        if stored is not None and stored.operator not in in_float
    }
    of_layers = {stored.operator for _, stored in layers if stored is not None}
    read = {
        stored_qparams(file.tensors[index])
        for op in file.operators
        if op.kind not in _ONLY_CARRY and op not in in_float and op not in of_layers
        for index in op.inputs
        if index >= 0 and file.tensors[index].quantized
    }
    found |= {
        key
        for key, tensor in model.tensors.items()
        if tensor.kind == "activation" and model_qparams(tensor) in read
    }
    return frozenset(found)
