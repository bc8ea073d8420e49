"""Read an ONNX file of unknown origin, and say in plain words what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import onnx.version_converter
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lightning_qat_exporters.onnx_files.boundary.functions import check_functions
from lightning_qat_exporters.onnx_files.boundary.memory import BUDGET, MemoryBudget
from lightning_qat_exporters.onnx_files.boundary.names import check_names
from lightning_qat_exporters.onnx_files.boundary.onnx_rules import check_rules
from lightning_qat_exporters.onnx_files.boundary.order import check_order
from lightning_qat_exporters.onnx_files.boundary.stored_data import check_stored_data
from lightning_qat_exporters.onnx_files.boundary.values import check_values
from lightning_qat_exporters.onnx_files.foreign_quantizers import foreign_quantization
from lightning_qat_exporters.onnx_files.nested import all_nodes

OLDEST_OPSET = 10
"""The first opset with QuantizeLinear."""

_FIRST_WITHOUT_CLIP_ATTRIBUTES = 11
_DEVICES = "device_configurations"
LARGEST_FILE = 2**31 - 1
"""Bytes of the largest message that protobuf reads."""


def load_proto(path: Path) -> onnx.ModelProto:
    """The model in a file, checked, without the data that it keeps in other files.

    Every tensor has the data that its shape and type declare, every node the inputs and attributes
    of its operator, and nodes are sorted. Operators that onnx does not know are taken as they are.

    Raises:
        FileNotFoundError: There is no such file, or external data is missing.
        ValueError: It is no ONNX model, is truncated, or breaks a rule; node or tensor is named.
    """
    proto = _parsed(path)
    _check(proto, path, standard=False)
    return proto


def load_with_data(path: Path) -> onnx.ModelProto:
    """As ``load_proto``, with the data of other files in the message.

    Raises:
        FileNotFoundError: There is no such file, or external data is missing.
        ValueError: It is no ONNX model, is truncated, or breaks a rule; node or tensor is named.
    """
    proto = _parsed(path)
    needed = _check(proto, path, standard=False)
    MemoryBudget(proto, path).take(needed, "what is stored")
    onnx.load_external_data_for_model(proto, str(path.parent))
    return proto


def read_onnx(path: Path, *, standard: bool = True, max_bytes: int | None = None) -> ir.Model:
    """Read a model; its large tensors stay on disk until they are used.

    Args:
        path: The ONNX file, of opset 10 or newer; external data beside it.
        standard: Refuse operators that ONNX has not in its own domain, and types and shapes that
            contradict each other.
        max_bytes: Most bytes that its tensors may take in memory; see ``MemoryBudget``.

    Returns:
        The model, at opset 11 or newer.

    Raises:
        FileNotFoundError: There is no such file, or external data is missing.
        ValueError: The file is no ONNX model, is truncated, breaks a rule of ONNX, or its tensors
            take more than ``max_bytes``; the message names node or tensor.
    """
    proto = _parsed(path)
    opset = _opset(proto, path)
    needed = _check(proto, path, standard=standard)
    budget = MemoryBudget(proto, path, max_bytes)
    budget.take(needed, "what is stored")
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise ValueError(
            f"Tensors must be dense; {str(path)!r} has the sparse initializer {name!r}. Store it "
            "as a dense one."
        )
    _forget_devices(proto)
    try:
        if opset < _FIRST_WITHOUT_CLIP_ATTRIBUTES:
            proto = onnx.version_converter.convert_version(proto, _FIRST_WITHOUT_CLIP_ATTRIBUTES)
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir raises many kinds
        raise ValueError(f"{str(path)!r} is not a valid ONNX model: {error}") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    _hold_values_once(model)
    model.meta[BUDGET] = budget
    # ONNX has two names for its own domain.
    if "ai.onnx" in model.opset_imports:
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    return model


def _parsed(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise FileNotFoundError(f"There must be an ONNX model at {str(path)!r}; no file is there.")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(
            f"{str(path)!r} must be an ONNX model, which has less than 2 GiB without its external "
            f"data; the file has {path.stat().st_size} bytes."
        )
    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise ValueError(
            f"{str(path)!r} must be an ONNX model; it is truncated or something else ({error})."
        ) from error


def _check(proto: onnx.ModelProto, path: Path, *, standard: bool) -> int:
    """Check what must hold before anything is made of a model; bytes of all its tensors."""
    check_names(proto, str(path))
    check_values(proto, str(path))
    needed = check_stored_data(proto, path)
    check_order(proto.graph, str(path))
    check_functions(proto, str(path))
    check_rules(proto, str(path), standard=standard)
    return needed


def _forget_devices(proto: onnx.ModelProto) -> None:
    """Drop how a model is spread over several devices: what is made of it is for one."""
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in all_nodes(nodes):
            if _DEVICES in node.DESCRIPTOR.fields_by_name:  # onnx 1.18 has it first
                node.ClearField(_DEVICES)


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
            f"the newest that onnx {onnx.__version__} knows; {str(path)!r} has {versions[0]}. "
            "Install a newer onnx for a newer opset, or save the model with one in between."
        )
    return int(versions[0])


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
