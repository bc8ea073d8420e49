"""Whether onnx's inference of shapes survives a model."""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache

import onnx
from onnx import ModelProto, NodeProto

from lightning_qat_exporters.onnx_files.boundary.inference_process import InferenceProcess
from lightning_qat_exporters.onnx_files.nested import all_nodes

_STUB = "lightning_qat.stub"
_PROCESS = InferenceProcess()


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
    return _bytes_end(proto.SerializeToString())


@lru_cache(maxsize=4)
def _bytes_end(model: bytes) -> bool:
    # A command reads its file more than once.
    return _PROCESS.ends_on(model)


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
