"""Read and write the bytes of a ``.tflite`` file.

``unpack`` and ``pack`` go between bytes and LiteRT's own mutable objects; ``view`` shows such an
object as plain data. An export unpacks once, changes the objects, and packs once. Only this module
imports LiteRT's schema.

``ai_edge_litert.tools.flatbuffer_utils`` (2.3) reads and writes the same objects, and is not used:
its writer does not align constants to 16 bytes, and its reader drops and renumbers buffers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.tflite.flatbuffer.bounded import bounded_schema, budget

METADATA = "lightning_qat"
"""Name of the metadata entry that we write: JSON."""

DTYPES: Mapping[str, Any] = {
    "FLOAT32": np.float32,
    "FLOAT16": np.float16,
    "FLOAT64": np.float64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
"""LiteRT's names of types that NumPy has."""


_MOST_ELEMENTS = 2**31
"""Of a tensor: LiteRT counts bytes in 31 bits."""


@dataclass(frozen=True, eq=False)
class FileTensor:
    """One tensor of a file.

    Args:
        name: As the file has it.
        type: LiteRT's name of its type, such as ``INT8``.
        shape: Its shape, with the batch that the file is written for.
        scale: One scale or one per channel, float32; empty where the tensor is not quantized.
        zero_point: Zero points, as many as scales.
        axis: The channel axis of ``scale``.
        data: A constant's values; ``None`` for a computed tensor, or a type that NumPy lacks.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    scale: Array
    zero_point: Array
    axis: int
    data: Array | None

    @property
    def quantized(self) -> bool:
        """Whether it has a scale."""
        return self.scale.size > 0


@dataclass(frozen=True)
class FileOperator:
    """One operator: LiteRT's name such as ``CONV_2D``, and indices of tensors (-1: left out)."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TFLiteFile:
    """The main graph of a file.

    Args:
        tensors: All of them; operators name them by index.
        operators: In the order of execution.
        inputs: Index of each input, by its name.
        outputs: Index of each output, by its name.
        facts: The content of our metadata entry; empty in a file without one.
    """

    tensors: tuple[FileTensor, ...]
    operators: tuple[FileOperator, ...]
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    facts: Mapping[str, Any]

    def maker(self, tensor: int) -> FileOperator | None:
        """The operator that computes a tensor; ``None`` for inputs and constants."""
        return next((op for op in self.operators if tensor in op.outputs), None)

    @property
    def float_operators(self) -> tuple[FileOperator, ...]:
        """Operators that compute in float: all that write a float tensor, DEQUANTIZE apart.

        Operators that read float and write integers only round: QUANTIZE, ARG_MAX.
        """
        return tuple(
            op
            for op in self.operators
            if op.kind != "DEQUANTIZE"
            and any(self.tensors[index].type.startswith("FLOAT") for index in op.outputs)
        )


def read(content: bytes) -> TFLiteFile:
    """Read the main graph of a file of anyone.

    Raises:
        ValueError: It is cut off or damaged, or claims to hold more than it does.
    """
    with _refusing_damage():
        return view(unpack(content))


def view(model: Any) -> TFLiteFile:
    """Show the main graph of an unpacked file as it is now; constants are not copied."""
    graph = model.subgraphs[0]
    inputs, outputs = _signature(model, graph)
    facts: dict[str, Any] = {}
    for entry in model.metadata or ():
        if entry.name == METADATA.encode():
            facts = json.loads(bytes(model.buffers[entry.buffer].data))
    if not isinstance(facts, dict):
        raise ValueError(f"its metadata entry {METADATA!r} must be a table; got {facts!r}")
    operators = tuple(
        FileOperator(kind_of(model, op), _indices(op.inputs), _indices(op.outputs))
        for op in graph.operators
    )
    named = [*inputs.values(), *outputs.values(), *_indices(graph.inputs), *_indices(graph.outputs)]
    read_and_written = [i for op in operators for i in (*op.inputs, *op.outputs) if i != -1]
    _require_indices([*named, *read_and_written], len(graph.tensors))
    tensors = tuple(_tensor(model, tensor) for tensor in graph.tensors)
    return TFLiteFile(tensors, operators, inputs, outputs, facts)


def unpack(content: bytes) -> Any:
    """The file as LiteRT's ``ModelT``.

    Raises:
        ValueError: As ``read``.
    """
    s = schema()
    with _refusing_damage(), budget(len(content)):
        return s.ModelT.InitFromObj(s.Model.GetRootAsModel(content, 0))


@contextmanager
def _refusing_damage() -> Iterator[None]:
    """Turn what flatbuffers and views of a file without sense raise into one kind of error."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # flatbuffers reads whatever the offsets say
        told = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"The TFLite file is cut off or damaged ({told}).") from error


def pack(model: Any) -> bytes:
    """The bytes of a ``ModelT``."""
    import flatbuffers

    class Aligned(flatbuffers.Builder):  # type: ignore[misc]  # flatbuffers ships no types
        """Aligns vectors of bytes to 16, as LiteRT's schema demands of constants.

        flatbuffers' Python code does not know the schema's ``force_align``.
        """

        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802, N803
            # The names are flatbuffers'.
            return super().StartVector(elemSize, numElems, 16 if elemSize == 1 else alignment)

    builder = Aligned(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def prune(model: Any) -> None:
    """Drop the operator codes and tensors that nothing uses any more, in place."""
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    codes = sorted({operator.opcodeIndex for operator in graph.operators})
    for operator in graph.operators:
        operator.opcodeIndex = codes.index(operator.opcodeIndex)
    model.operatorCodes = [model.operatorCodes[index] for index in codes]
    ends = [*_indices(graph.inputs), *_indices(graph.outputs)]
    used = {index for op in graph.operators for index in (*op.inputs, *op.outputs) if index >= 0}
    kept = sorted({*ends, *map(int, used)})
    place = {-1: -1, **{old: new for new, old in enumerate(kept)}}
    graph.tensors = [graph.tensors[index] for index in kept]
    for holder in (*graph.operators, graph):
        holder.inputs = [place[index] for index in _indices(holder.inputs)]
        holder.outputs = [place[index] for index in _indices(holder.outputs)]
    for entry in (*signature.inputs, *signature.outputs):
        entry.tensorIndex = place[int(entry.tensorIndex)]


def schema() -> Any:
    """LiteRT's schema: a module with one class per table of the file format."""
    return bounded_schema()


def kind_of(model: Any, operator: Any) -> str:
    """LiteRT's name of an operator's kind."""
    code = model.operatorCodes[operator.opcodeIndex]
    # Old files know only the deprecated byte; new ones write both.
    name = _names("BuiltinOperator")[max(code.builtinCode, code.deprecatedBuiltinCode)]
    return code.customCode.decode() if name == "CUSTOM" else name


def code_of(model: Any, name: str) -> int:
    """The index of an operator's code, added when the file does not use it yet."""
    s = schema()
    value = getattr(s.BuiltinOperator, name)
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == value:
            return index
    code = s.OperatorCodeT()
    # Version 2 of QUANTIZE also takes integers.
    code.builtinCode, code.version = value, 2
    code.deprecatedBuiltinCode = min(value, 127)
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def insert_operator(model: Any, place: int, name: str, source: int, target: int) -> None:
    """Insert a QUANTIZE or DEQUANTIZE from one tensor to another into the main graph.

    Args:
        model: An unpacked file; changed in place.
        place: Index in the order of execution.
        name: ``QUANTIZE`` or ``DEQUANTIZE``.
        source: Index of the tensor that it reads.
        target: Index of the tensor that it writes.
    """
    s = schema()
    operator = s.OperatorT()
    operator.opcodeIndex = code_of(model, name)
    operator.inputs, operator.outputs = [source], [target]
    quantizes = name == "QUANTIZE"
    operator.builtinOptions = s.QuantizeOptionsT() if quantizes else s.DequantizeOptionsT()
    options = s.BuiltinOptions
    operator.builtinOptionsType = (
        options.QuantizeOptions if quantizes else options.DequantizeOptions
    )
    model.subgraphs[0].operators.insert(place, operator)


@cache
def _names(enumeration: str) -> dict[int, str]:
    values = vars(getattr(schema(), enumeration))
    return {value: name for name, value in values.items() if not name.startswith("_")}


def _indices(values: Any) -> tuple[int, ...]:
    return () if values is None else tuple(int(value) for value in values)


def _signature(model: Any, graph: Any) -> tuple[dict[str, int], dict[str, int]]:
    if model.signatureDefs:
        signature = model.signatureDefs[0]
        inputs, outputs = (
            {entry.name.decode(): int(entry.tensorIndex) for entry in entries or ()}
            for entries in (signature.inputs, signature.outputs)
        )
        return inputs, outputs
    inputs, outputs = (
        {graph.tensors[index].name.decode(): index for index in _indices(indices)}
        for indices in (graph.inputs, graph.outputs)
    )
    return inputs, outputs


def _require_indices(indices: Sequence[int], count: int) -> None:
    for index in indices:
        if not 0 <= index < count:
            raise ValueError(f"an operator or a signature names tensor {index} of {count}")


def _tensor(model: Any, tensor: Any) -> FileTensor:
    quantization = tensor.quantization
    scale = None if quantization is None else quantization.scale
    zero_point = None if quantization is None else quantization.zeroPoint
    kind = _names("TensorType")[tensor.type]
    shape, dtype = _indices(tensor.shape), DTYPES.get(kind)
    if any(size < 0 for size in shape) or math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError(f"a tensor has shape {[*shape]}")
    content = model.buffers[tensor.buffer].data
    data = None
    if content is not None and dtype is not None:
        data = np.asarray(content, np.uint8).view(dtype).reshape(shape)
    return FileTensor(
        tensor.name.decode(),
        kind,
        shape,
        np.asarray([] if scale is None else scale, np.float32),
        np.asarray([] if zero_point is None else zero_point, np.int64),
        0 if quantization is None else int(quantization.quantizedDimension),
        data,
    )
