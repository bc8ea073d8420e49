"""What a TFLite file computes on integers, and what in float."""

from __future__ import annotations

import math
from pathlib import Path

from lightning_qat.export.files.inspection import (
    InspectedLayer,
    InspectedTensor,
    Inspection,
    counted,
    sizes,
)
from lightning_qat.export.protocol import MissingDependency
from lightning_qat_exporters.tflite.flatbuffer.file import FileOperator, TFLiteFile, read

_PRODUCTS = frozenset(
    "CONV_2D DEPTHWISE_CONV_2D CONV_3D TRANSPOSE_CONV FULLY_CONNECTED BATCH_MATMUL".split()
)


def inspect_tflite(path: Path) -> Inspection:
    """What a TFLite file of anyone holds.

    Raises:
        MissingDependency: LiteRT's schema is not installed.
        ValueError: The file is cut off or damaged.
    """
    try:
        return _inspection(read(path.read_bytes()), path)
    except ImportError as error:
        raise MissingDependency(
            "Reading a TFLite file needs ai-edge-litert: pip install 'lightning-qat[tflite]'."
        ) from error
    except (ValueError, LookupError) as error:  # an operator may lack what its kind reads
        raise ValueError(f"{str(path)!r} must be a whole TFLite file: {error}") from error


def _inspection(file: TFLiteFile, path: Path) -> Inspection:
    in_float = {id(operator) for operator in file.float_operators}
    layers = tuple(
        InspectedLayer(_name(file, op), op.kind, id(op) not in in_float, _macs(file, op))
        for op in file.operators
        if op.kind in _PRODUCTS
    )
    others = (op for op in file.float_operators if op.kind not in _PRODUCTS)
    return Inspection(
        "TFLite file",
        sizes([path]),
        tuple(_tensors(file)),
        layers,
        counted(op.kind for op in file.operators),
        tuple(f"{op.kind} {_name(file, op)}" for op in others),
        {name: str(value) for name, value in file.facts.items() if isinstance(value, str)},
    )


def _tensors(file: TFLiteFile) -> list[InspectedTensor]:
    return [
        InspectedTensor(
            tensor.name,
            "activation" if tensor.data is None else "weight",
            tensor.type.lower(),
            tuple(tensor.scale.tolist()),
            tuple(tensor.zero_point.tolist()),
            tensor.axis if tensor.scale.size > 1 else None,
        )
        for tensor in file.tensors
        if tensor.quantized and not (tensor.data is not None and tensor.type == "INT32")
    ]


def _name(file: TFLiteFile, operator: FileOperator) -> str:
    return file.tensors[operator.outputs[0]].name


def _macs(file: TFLiteFile, operator: FileOperator) -> int | None:
    """For the batch that the file is written for, which is one sample as we export."""
    if operator.kind == "CONV_3D":
        return None
    data, weight = (file.tensors[index].shape for index in operator.inputs[:2])
    made = file.tensors[operator.outputs[0]].shape
    if operator.kind == "TRANSPOSE_CONV":
        # Its inputs are the output's shape, the weight [out, height, width, in], the data.
        data = file.tensors[operator.inputs[2]].shape
        return math.prod(data) * math.prod(weight[:3])
    if operator.kind == "BATCH_MATMUL":
        return math.prod(made) * data[-1]
    if operator.kind == "DEPTHWISE_CONV_2D":
        return math.prod(made) * math.prod(weight[1:3])
    return math.prod(made) * math.prod(weight[1:])
