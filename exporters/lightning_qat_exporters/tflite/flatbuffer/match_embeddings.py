"""Find the tables of embeddings in a ``.tflite`` file by their values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from lightning_qat.ir.ops import as_dequantize
from lightning_qat.ir.quantized_model import QuantizedModel, QuantizedTensor
from lightning_qat.numerics.arithmetic import along_axis, dequantize
from lightning_qat_exporters.tflite.decompose.constant_nodes import fixed_in
from lightning_qat_exporters.tflite.flatbuffer.file import FileTensor, TFLiteFile

_TABLE = {"EMBEDDING_LOOKUP": 1, "GATHER": 0}
"""Operator to the place of its table among the inputs."""


def tables(file: TFLiteFile, model: QuantizedModel) -> Iterator[tuple[QuantizedTensor, int | None]]:
    """Yield every quantized weight that is looked up, and its constant in the file.

    The constant holds either the integers, maybe with a DEQUANTIZE behind them, or real values as
    litert-torch writes them: exactly the product of integers and scale. Its index is ``None`` when
    no operator reads it. A table whose rows depend on no input of the model, such as that of
    positions, is no operator of the file: converters store its rows.
    """
    stored = {
        _origin(file, op.inputs[_TABLE[op.kind]]) for op in file.operators if op.kind in _TABLE
    }
    multiplied = {layer.weight_key for layer in model.layers}
    constant = _read_by_constants(model)
    for key, table in model.tensors.items():
        if table.kind == "weight" and key not in multiplied and key not in constant:
            found = (index for index in stored if _is_table(file.tensors[index], table))
            yield table, next(found, None)


def _read_by_constants(model: QuantizedModel) -> set[str]:
    """The keys of weights of which every reader computes what depends on no input."""
    fixed = fixed_in(model)
    calls = ((node, as_dequantize(node)) for node in model.program.graph.nodes)
    return {
        call.key
        for node, call in calls
        if call is not None and node.users and all(user.name in fixed for user in node.users)
    }


def _origin(file: TFLiteFile, index: int) -> int:
    maker = file.maker(index)
    return maker.inputs[0] if maker is not None and maker.kind == "DEQUANTIZE" else index


def _is_table(stored: FileTensor, table: QuantizedTensor) -> bool:
    integers, qparams = table.integers, table.qparams
    if integers is None or stored.data is None or stored.shape != tuple(integers.shape):
        return False
    if stored.quantized:
        same = np.array_equal(stored.scale, qparams.scale.numpy().reshape(-1))
        zero = not stored.zero_point.any()
        return same and zero and np.array_equal(stored.data, integers.numpy())
    scale = along_axis(qparams.scale, integers.dim(), qparams.axis)
    return np.array_equal(stored.data, dequantize(integers, scale, torch.tensor(0)).numpy())
