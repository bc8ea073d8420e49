"""Set the type of the inputs and outputs of an unpacked integer file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from lightning_qat.export.protocol import Unsupported
from lightning_qat_exporters.tflite.flatbuffer.file import insert_operator, schema


def give_types(model: Any, io: str) -> tuple[Unsupported, ...]:
    """Put QUANTIZE and DEQUANTIZE at the ends of a file's main graph, in place.

    ``float`` makes every quantized input and output float32; ``uint8`` makes every int8 one uint8,
    the same real numbers with the zero point up by 128; ``int8`` leaves them as they are.

    Args:
        model: A file as ``unpack`` gives it, with a signature.
        io: ``float``, ``int8`` or ``uint8``.

    Returns:
        Float inputs and outputs, which have no scale for integers; empty for ``float``. Tensors
        that hold no real numbers (indices, masks) are not changed.
    """
    signature = model.signatureDefs[0]
    problems: list[Unsupported] = []
    for entry in signature.inputs:
        problems += _check(model, entry, io, "read")
        _replace(model, entry, io, is_input=True)
    for entry in signature.outputs:
        problems += _check(model, entry, io, "written")
        _replace(model, entry, io, is_input=False)
    return tuple(problems)


def _check(model: Any, entry: Any, io: str, verb: str) -> Iterator[Unsupported]:
    s = schema()
    kind = model.subgraphs[0].tensors[entry.tensorIndex].type
    wanted = {"int8": (s.TensorType.INT8,), "uint8": (s.TensorType.INT8, s.TensorType.UINT8)}
    reals = (s.TensorType.FLOAT32, s.TensorType.INT16, s.TensorType.INT8, s.TensorType.UINT8)
    if io in wanted and kind in reals and kind not in wanted[io]:
        what = "16-bit integers" if kind == s.TensorType.INT16 else "float"
        yield Unsupported(
            entry.name.decode(),
            f"it is {verb} as {what}, so it cannot be {io}",
            "Use io='float', or quantize it to 8 bits in training (Recipe(joins=True, "
            "outputs=True); the first operation on an input must have a quantized form)",
        )


def _replace(model: Any, entry: Any, io: str, *, is_input: bool) -> None:
    s, graph = schema(), model.subgraphs[0]
    inner = int(entry.tensorIndex)
    outer = copy.copy(graph.tensors[inner])
    quantization = outer.quantization
    integers = (s.TensorType.INT8, s.TensorType.INT16, s.TensorType.UINT8)
    if (
        outer.type not in integers
        or quantization is None
        or quantization.scale is None
        or not len(quantization.scale)
    ):
        return
    if io == "float":
        outer.type, outer.quantization = s.TensorType.FLOAT32, None
    elif io == "uint8" and outer.type == s.TensorType.INT8:
        outer.type, outer.quantization = s.TensorType.UINT8, copy.copy(quantization)
        outer.quantization.zeroPoint = [int(z) + 128 for z in quantization.zeroPoint]
    else:
        return
    graph.tensors[inner].name += b"_quantized"
    graph.tensors.append(outer)
    new = len(graph.tensors) - 1
    entry.tensorIndex = new
    ends = graph.inputs if is_input else graph.outputs
    ends = [new if int(index) == inner else int(index) for index in ends]
    if is_input:
        graph.inputs = ends
        insert_operator(model, 0, "QUANTIZE", new, inner)
    else:
        graph.outputs = ends
        name = "DEQUANTIZE" if io == "float" else "QUANTIZE"
        insert_operator(model, len(graph.operators), name, inner, new)
