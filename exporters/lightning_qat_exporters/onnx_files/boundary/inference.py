"""Whether onnx's inference of shapes survives a model."""

from __future__ import annotations

import subprocess
import sys
from bisect import bisect_left
from functools import lru_cache

import onnx
from onnx import ModelProto, NodeProto, onnx_cpp2py_export

from lightning_qat_exporters.onnx_files.nested import all_nodes

_STUB = "lightning_qat.stub"
_INFER = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader

name, path, memory, too_large = sys.argv[1:]
try:
    import resource
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
except Exception:
    pass
try:
    loader = ExtensionFileLoader(name, path)
    native = module_from_spec(spec_from_loader(name, loader))
    loader.exec_module(native)
    infer = native.shape_inference.infer_shapes
except Exception:
    from onnx.onnx_cpp2py_export.shape_inference import infer_shapes as infer
try:
    infer(sys.stdin.buffer.read(), False, False, True)
except MemoryError:
    sys.exit(int(too_large))
"""
"""Loads onnx's C++ code without its Python packages, which take eight times as long."""
_TOO_LARGE = 99
_ENDED = frozenset({3, 0xC0000409, _TOO_LARGE})
"""What Windows gives for ``abort``; elsewhere a signal is a negative number."""
_MEMORY = 2**31
"""Bytes that the process may take beside a hundred times the model's."""


def check_inference(proto: ModelProto, path: str) -> None:
    """Refuse a model on which onnx's C++ code ends the process, or takes all memory.

    Indices beyond the end of a vector and ``std::clamp`` out of its domain abort in builds with
    assertions, and ONNX Runtime with them. onnx 1.23 ends so on a Split into fewer parts than it
    has outputs, a Slice of sizes below zero, and on GatherND, LayerNormalization, EyeLike and
    RegexFullMatch of ranks that do not fit; a Split may say that it makes 2**33 parts. So a process
    of its own tries every model first.

    Args:
        proto: The model; needs no large weights.
        path: Its file, for messages.

    Raises:
        ValueError: The process ended; the message names the node, and for a Slice a tensor whose
            size is below zero.
    """
    if not _ends(proto):
        return
    node = _first_to_end(proto)
    if node.op_type == "Slice":
        raise ValueError(
            f"A Slice of {path!r} must read sizes of zero or more, and of one or more with a "
            f"negative step; {_named(node)} does not{_below_zero(proto)}. onnx and ONNX Runtime "
            "end the process on such a model. Give an unknown size a name (dim_param) instead of "
            "a number, or correct the node that makes it."
        )
    raise ValueError(
        f"Inputs, outputs and attributes of every node must fit together; on {_named(node)} of "
        f"{path!r} onnx ends the process or takes all memory, and ONNX Runtime may. Compare ranks, "
        "axes and the number of outputs with ONNX's description of the operator."
    )


def _ends(proto: ModelProto) -> bool:
    """Whether inference ends its process, in 0.03 s for a small model."""
    return _bytes_end(proto.SerializeToString())


@lru_cache(maxsize=4)
def _bytes_end(model: bytes) -> bool:
    # A command reads its file more than once.
    native = onnx_cpp2py_export.__name__, onnx_cpp2py_export.__file__
    limits = str(_MEMORY + 100 * len(model)), str(_TOO_LARGE)
    command = [sys.executable, "-c", _INFER, *native, *limits]
    done = subprocess.run(command, input=model, capture_output=True, check=False)
    return done.returncode < 0 or done.returncode in _ENDED


def _first_to_end(proto: ModelProto) -> NodeProto:
    """The first node on which the process ends: half of the nodes are tried at a time."""
    trial = ModelProto()
    trial.CopyFrom(proto)
    del trial.graph.output[:]

    def ends_with(count: int) -> bool:
        del trial.graph.node[:]
        trial.graph.node.extend(proto.graph.node[:count])
        return _ends(trial)

    place = bisect_left(range(len(proto.graph.node) + 1), True, key=ends_with)
    node: NodeProto = proto.graph.node[min(place, len(proto.graph.node)) - 1]
    return node


def _named(node: NodeProto) -> str:
    return f"{node.name or ', '.join(node.output)!r} ({node.op_type})"


def _below_zero(proto: ModelProto) -> str:
    """Name a tensor with a size below zero, from an inference without Slice."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    for owner in (copy, *copy.functions):
        owner.opset_import.append(onnx.helper.make_opsetid(_STUB, 1))
    for nodes in (copy.graph.node, *(function.node for function in copy.functions)):
        for node in all_nodes(nodes):
            if node.op_type == "Slice":
                node.domain = _STUB
    graph = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if any(size < 0 for size in sizes):
            return f"; {value.name!r} has the shape {sizes}"
    return ""
