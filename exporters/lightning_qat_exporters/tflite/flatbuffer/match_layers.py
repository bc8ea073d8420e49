"""Find the layers of a converted model among the operators of a ``.tflite`` file.

A file keeps neither the names nor the layout of torch's weights, so a layer is recognised by its
integers and scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_qat.export.protocol import Array
from lightning_qat.ir.quantized_model import QuantizedLayer, QuantizedModel, QuantizedTensor
from lightning_qat.numerics.arithmetic import along_axis, dequantize
from lightning_qat_exporters.tflite.decompose.constant_nodes import fixed_in
from lightning_qat_exporters.tflite.decompose.conv_transpose import dense_like, dense_scale
from lightning_qat_exporters.tflite.flatbuffer.file import FileOperator, FileTensor, TFLiteFile

# Operator to the permutation that brings its weight into torch's order of axes, and the places of
# its input and bias; the weight is always the second.
_OPERATORS: dict[str, tuple[tuple[int, ...] | None, int, int]] = {
    "CONV_2D": ((0, 3, 1, 2), 0, 2),
    "DEPTHWISE_CONV_2D": ((3, 0, 1, 2), 0, 2),
    "FULLY_CONNECTED": (None, 0, 2),
    "TRANSPOSE_CONV": ((3, 0, 1, 2), 2, 3),
    "CONV_3D": ((4, 3, 0, 1, 2), 0, 2),
    "CONV_3D_TRANSPOSE": ((4, 3, 0, 1, 2), 2, 3),
    "BATCH_MATMUL": (None, 0, 2),
}

_VALUE_PRESERVING = ("PAD", "PADV2", "TRANSPOSE", "RESHAPE", "SQUEEZE", "EXPAND_DIMS", "DEQUANTIZE")


@dataclass(frozen=True, eq=False)
class FileLayer:
    """An operator with a constant weight.

    Args:
        operator: The operator that computes it.
        weight: Index of its constant: integers, which may stand behind a DEQUANTIZE, or real
            values, as litert-torch writes some.
        source: The quantized tensor that it reads; ``None`` when it reads a float one.
        bias: Index of its bias; ``None`` without one.
    """

    operator: FileOperator
    weight: int
    source: FileTensor | None
    bias: int | None


MatchedLayers = tuple[tuple[QuantizedLayer, FileLayer | None], ...]
"""The model's layers, each with its operator in a file; ``None``: the file has none for it."""


def file_layers(file: TFLiteFile) -> tuple[FileLayer, ...]:
    """Every layer of a file, in its order."""
    return tuple(_file_layers(file))


def match_layers(file: TFLiteFile, model: QuantizedModel) -> MatchedLayers:
    """Find the operator that has a layer's integers, scales and input's qparams, for every layer.

    Layers that are equal in all of these are matched in order. A layer whose input has other
    qparams in the file is still found by its weight, so that ``read_back`` can report the
    difference. A call that depends on no input of the model, such as a recurrent layer's first
    step from zero, is no operator of the file.
    """
    free = list(file_layers(file))
    found = []
    fixed = fixed_in(model)
    for layer in model.layers:
        if layer.node in fixed:
            continue
        weight, source = model.tensors[layer.weight_key], model.tensors[layer.input_key]
        chosen = None
        # Files keep the order of layers, so the first candidate is usually right.
        for one in (one for one in free if same_weight(file, one, weight)):
            exact = one.source is not None and same_qparams(one.source, source)
            chosen = one if exact else chosen or one
            if exact:
                break
        if chosen is not None:
            free.remove(chosen)
        found.append((layer, chosen))
    return tuple(found)


def same_weight(file: TFLiteFile, layer: FileLayer, weight: QuantizedTensor) -> bool:
    """Whether a layer's weight has the integers and the scales of the model's, to the bit.

    Real values must be the product of the two, to the bit.
    """
    stored, kind = file.tensors[layer.weight], layer.operator.kind
    expected, qparams = weight.integers, weight.qparams
    assert expected is not None
    scale = qparams.scale
    if "TRANSPOSE" in kind and stored.data is not None:
        permutation = _OPERATORS[kind][0]
        assert permutation is not None
        shape = [stored.shape[axis] for axis in permutation]
        # One of one dimension is stored as a picture of height 1.
        found = dense_like(expected, tuple(shape[:2] + shape[-(expected.dim() - 2) :]))
        if found is None:
            return False
        expected = found
        scale = dense_scale(qparams, expected.shape[1])
    values = torch_order(stored.data, kind, expected)
    if values is None:
        return False
    if stored.quantized:
        return np.array_equal(values, expected.numpy()) and _same_scales(
            stored, scale.numpy(), np.zeros(1)
        )
    real = dequantize(expected, along_axis(scale, expected.dim(), qparams.axis), torch.tensor(0))
    return np.array_equal(values, real.numpy())


def stored_qparams(stored: FileTensor) -> tuple[float, int] | None:
    """The scale and the int8 zero point of an activation; ``None`` where it has several.

    Both may be repeated for each channel.
    """
    scales, zero_points = set(stored.scale.tolist()), set(stored.zero_point.tolist())
    if stored.scale.size not in (1, max(stored.shape, default=1)):
        return None
    if len(scales) != 1 or len(zero_points) != 1:
        return None
    return scales.pop(), zero_points.pop() - (128 if stored.type == "UINT8" else 0)


def model_qparams(tensor: QuantizedTensor) -> tuple[float, int]:
    """Scale and zero point of one of the model's activations, as ``stored_qparams`` has them."""
    return float(tensor.qparams.scale), int(tensor.qparams.zero_point)


def same_qparams(stored: FileTensor, tensor: QuantizedTensor) -> bool:
    """Whether scale and zero point are the model's to the bit."""
    return stored_qparams(stored) == model_qparams(tensor)


def _same_scales(stored: FileTensor, scale: Array, zero_point: Array) -> bool:
    shift = 128 if stored.type == "UINT8" else 0
    if stored.scale.size not in (scale.size, max(stored.shape, default=1)) or scale.size < 1:
        return False
    if scale.size > 1 and stored.scale.size != scale.size:
        return False
    return bool(
        np.all(stored.scale == scale.reshape(-1))
        and np.all(stored.zero_point - shift == zero_point.reshape(-1))
    )


def torch_order(data: Array | None, kind: str, integers: Tensor) -> Array | None:
    """A stored weight in the order of axes and the shape of the model's; ``None``: it differs."""
    permutation = _OPERATORS[kind][0]
    if data is None or data.size != integers.numel():
        return None
    if permutation is not None and data.ndim == len(permutation):
        data = np.transpose(data, permutation)
    return np.reshape(data, tuple(integers.shape))


def _file_layers(file: TFLiteFile) -> Iterator[FileLayer]:
    makers = {output: op for op in file.operators for output in op.outputs}

    def origin(index: int) -> int:
        """The tensor that an index stands for, behind value-preserving operators and DEQUANTIZE."""
        while not file.tensors[index].quantized:
            maker = makers.get(index)
            if maker is None or maker.kind not in _VALUE_PRESERVING:
                break
            index = maker.inputs[0]
        return index

    for operator in file.operators:
        if operator.kind not in _OPERATORS:
            continue
        _, source, bias = _OPERATORS[operator.kind]
        weight = origin(operator.inputs[1])
        if file.tensors[weight].data is None:
            continue
        read = file.tensors[origin(operator.inputs[source])]
        has_bias = len(operator.inputs) > bias and operator.inputs[bias] >= 0
        stored = origin(operator.inputs[bias]) if has_bias else None
        if "3D" in operator.kind and (added := _added(file, operator)) is not None:
            stored = added
        yield FileLayer(operator, weight, read if read.quantized else None, stored)


def _added(file: TFLiteFile, operator: FileOperator) -> int | None:
    """Find the constant that an ADD adds to an output: the bias of a 3-D layer of litert-torch."""
    readers = [op for op in file.operators if operator.outputs[0] in op.inputs]
    if [op.kind for op in readers] != ["ADD"]:
        return None
    other = next(index for index in readers[0].inputs if index != operator.outputs[0])
    return other if file.tensors[other].data is not None else None
