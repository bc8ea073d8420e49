"""Read an ONNX file of unknown origin, and say in plain words what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx.version_converter
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lightning_qat_exporters.onnx_files.foreign_quantizers import foreign_quantization

OLDEST_OPSET = 10
"""The first opset with QuantizeLinear."""

_FIRST_WITHOUT_CLIP_ATTRIBUTES = 11
_NO_RAW_SIZE = {onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED}


def load_proto(path: Path) -> onnx.ModelProto:
    """The model in a file, without the data that it keeps in other files.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no ONNX model, or truncated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There must be an ONNX model at {str(path)!r}; no file is there.")
    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise ValueError(
            f"{str(path)!r} must be an ONNX model; it is truncated or something else ({error})."
        ) from error


def read_onnx(path: Path) -> ir.Model:
    """Read a model; its large tensors stay on disk until they are used.

    Args:
        path: The ONNX file, of opset 10 or newer; external data beside it.

    Returns:
        The model, at opset 11 or newer.

    Raises:
        FileNotFoundError: There is no such file, or external data is missing.
        ValueError: The file is no ONNX model, is truncated, or its graph is not sorted, cyclic,
            or refers to what is not there; the message names node and tensor.
    """
    proto = load_proto(path)
    opset = _opset(proto, path)
    _check_order(proto.graph, set(), str(path))
    for tensor in _tensors(proto.graph):
        _check_data(tensor, path)
    if opset < _FIRST_WITHOUT_CLIP_ATTRIBUTES:
        proto = onnx.version_converter.convert_version(proto, _FIRST_WITHOUT_CLIP_ATTRIBUTES)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise ValueError(f"{str(path)!r} is not a valid ONNX model: {error}") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    _hold_values_once(model)
    # ONNX has two names for its own domain.
    if "ai.onnx" in model.opset_imports:
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    return model


def require_quantized(model: ir.Model, path: Path) -> None:
    """Raise ``ValueError`` for a float model, and for one that is quantized in another form."""
    nodes = [*model.graph.all_nodes()]
    nodes += [n for function in model.functions.values() for n in function.all_nodes()]
    foreign = foreign_quantization(nodes)
    if foreign is not None:
        raise ValueError(
            "Quantization must be QuantizeLinear and DequantizeLinear nodes of integers; "
            f"{str(path)!r} has\n{foreign}"
        )
    if not {node.op_type for node in nodes} & {"QuantizeLinear", "DequantizeLinear"}:
        raise ValueError(
            f"The model must have QuantizeLinear and DequantizeLinear nodes; {str(path)!r} is a "
            "float model. Train it with quantization first, or quantize it with a tool that "
            "writes them."
        )


def _opset(proto: onnx.ModelProto, path: Path) -> int:
    versions = [i.version for i in proto.opset_import if i.domain in ("", "ai.onnx")]
    if not versions or not proto.graph.node:
        raise ValueError(
            f"{str(path)!r} must be an ONNX model with an opset and nodes; it has "
            f"{'nodes but no opset' if proto.graph.node else 'no nodes'}. Is it truncated?"
        )
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= versions[0] <= newest:
        raise ValueError(
            f"The opset must be from {OLDEST_OPSET}, the first with QuantizeLinear, to {newest}, "
            f"the newest that onnx {onnx.__version__} knows; {str(path)!r} has {versions[0]}."
        )
    return int(versions[0])


def _check_order(graph: onnx.GraphProto, outer: set[str], path: str) -> None:
    """Check that every tensor is made once, and before it is read."""
    made = {value.name for value in (*graph.input, *graph.initializer)} | outer
    made |= {tensor.values.name for tensor in graph.sparse_initializer} | {""}
    maker = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        for name in node.input:
            if name not in made:
                raise ValueError(_unmade(node, name, maker, path))
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                _check_order(subgraph, made, path)
        for name in node.output:
            if name and name in made:
                raise ValueError(
                    f"Every tensor must be made once; in {path!r} the node {_name(node)} makes "
                    f"{name!r}, which is there already."
                )
            made.add(name)
    for value in graph.output:
        if value.name not in made:
            raise ValueError(f"Nothing in {path!r} makes the output {value.name!r}.")


def _unmade(node: onnx.NodeProto, name: str, maker: dict[str, onnx.NodeProto], path: str) -> str:
    reads = f"In {path!r} the node {_name(node)} reads the tensor {name!r}, "
    if name not in maker:
        return f"{reads}which nothing makes."
    if _reaches(node, maker[name], maker):
        return (
            f"{reads}which {_name(maker[name])} makes from its own output: a graph must have no "
            "cycle."
        )
    return (
        f"{reads}which {_name(maker[name])} makes only later: nodes must be sorted so that every "
        "tensor is made before it is read."
    )


def _reaches(start: onnx.NodeProto, end: onnx.NodeProto, maker: dict[str, onnx.NodeProto]) -> bool:
    """Whether ``end`` reads, directly or not, an output of ``start``."""
    outputs, waiting, seen = set(start.output), [end], set[int]()
    while waiting:
        node = waiting.pop()
        if outputs & set(node.input):
            return True
        before = (maker[name] for name in node.input if name in maker)
        fresh = [n for n in before if id(n) not in seen]
        seen.update(map(id, fresh))
        waiting += fresh
    return False


def _hold_values_once(model: ir.Model) -> None:
    """Take the tensors out of protobuf's message, which copies their bytes at every look."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.TensorProtoTensor):
                value.const_value = _array_tensor(value.const_value)
    for node in model.graph.all_nodes():
        for name, attribute in node.attributes.items():
            if isinstance(attribute.value, ir.TensorProtoTensor):
                node.attributes[name] = ir.AttrTensor(name, _array_tensor(attribute.value))


def _array_tensor(tensor: ir.TensorProtoTensor) -> ir.TensorProtocol:
    if tensor.dtype == ir.DataType.STRING:
        return tensor
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def _name(node: onnx.NodeProto) -> str:
    return f"{node.name or (node.output[0] if node.output else '')!r} ({node.op_type})"


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)


def _check_data(tensor: onnx.TensorProto, path: Path) -> None:
    """Check that a tensor's bytes are there, in the file or beside it."""
    if tensor.data_type in _NO_RAW_SIZE:
        return
    bits = 8 * ir.DataType(tensor.data_type).itemsize
    needed = math.ceil(math.prod(tensor.dims) * bits / 8)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        if tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
            raise ValueError(
                f"The tensor {tensor.name!r} in {str(path)!r} must have {needed} bytes for its "
                f"shape {list(tensor.dims)}; it has {len(tensor.raw_data)}."
            )
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = Path(entries.get("location", ""))
    if location.is_absolute() or ".." in location.parts:
        raise ValueError(
            f"External data must lie beside the model; the tensor {tensor.name!r} in "
            f"{str(path)!r} names {str(location)!r}."
        )
    file = path.parent / location
    if not file.is_file():
        raise FileNotFoundError(
            f"The tensor {tensor.name!r} in {str(path)!r} has its data in {str(file)!r}; no file "
            "is there. Put it beside the model."
        )
    end = int(entries.get("offset", 0)) + int(entries.get("length", needed))
    if int(entries.get("length", needed)) < needed or end > file.stat().st_size:
        raise ValueError(
            f"The tensor {tensor.name!r} in {str(path)!r} must have {needed} bytes of data in "
            f"{str(file)!r}, up to byte {end}; the file ends at {file.stat().st_size}."
        )
