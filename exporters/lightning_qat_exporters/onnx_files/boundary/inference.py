"""Whether onnx's inference of shapes survives a model."""

from __future__ import annotations

import subprocess
import sys

import onnx
from onnx import ModelProto, onnx_cpp2py_export

from lightning_qat_exporters.onnx_files.nested import all_nodes

_STUB = "lightning_qat.stub"
_INFER = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader

name, path = sys.argv[1:]
try:
    loader = ExtensionFileLoader(name, path)
    native = module_from_spec(spec_from_loader(name, loader))
    loader.exec_module(native)
    infer = native.shape_inference.infer_shapes
except Exception:
    from onnx.onnx_cpp2py_export.shape_inference import infer_shapes as infer
infer(sys.stdin.buffer.read(), False, False, True)
"""
"""Loads onnx's C++ code without its Python packages, which take eight times as long."""
_ABORTED = frozenset({3, 0xC0000409})
"""What Windows gives for ``abort``; elsewhere a signal is a negative number."""


def check_inference(proto: ModelProto, path: str) -> None:
    """Refuse a model for which onnx's C++ code ends the process instead of raising an error.

    The limits of a Slice come from the size of what it slices: below zero, or at zero with a
    negative step, ``std::clamp`` is called out of its domain, and builds with assertions abort;
    so does ONNX Runtime. Such sizes are declared, or follow from a pooling window, padding or
    split that does not fit. A process of its own tries it, 0.03 s, where a model has a Slice.

    Args:
        proto: The model; needs no large weights.
        path: Its file, for messages.

    Raises:
        ValueError: The process ended; the message names a tensor whose size is below zero.
    """
    graphs = [proto.graph.node, *(function.node for function in proto.functions)]
    if not any(node.op_type == "Slice" for nodes in graphs for node in all_nodes(nodes)):
        return
    done = subprocess.run(
        [sys.executable, "-c", _INFER, onnx_cpp2py_export.__name__, onnx_cpp2py_export.__file__],
        input=proto.SerializeToString(),
        capture_output=True,
        check=False,
    )
    if done.returncode < 0 or done.returncode in _ABORTED:
        raise ValueError(
            f"A Slice of {path!r} must read sizes of zero or more, and of one or more with a "
            f"negative step{_below_zero(proto)}. onnx and ONNX Runtime end the process on such a "
            "model. Give an unknown size a name (dim_param) instead of a number, or correct the "
            "node that makes it."
        )


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
