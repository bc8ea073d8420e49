"""The quantized activations inside a deploy model, from the reference executor."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from lightning_qat.export.protocol import Array
from lightning_qat.export.trace import Trace, TracedTensor
from lightning_qat_exporters.cann.executor.executor import AscendExecutor
from lightning_qat_exporters.onnx_files.cut import add_inputs, given_name, loaded, read_from, show


def trace_deploy(
    path: Path, runtime: str, inputs: Mapping[str, Array], given: Mapping[str, Array]
) -> Trace:
    """See ``Traceable.trace``; a tensor is named as the value that its AscendQuant writes.

    Readers of a tensor get what a second AscendQuant, with the attributes of the first, makes of
    the value that was given for it.
    """
    proto = loaded(path, runtime)
    outputs = [output.name for output in proto.graph.output]
    quants = [*map(copy.deepcopy, (n for n in proto.graph.node if n.op_type == "AscendQuant"))]
    show(proto, (node.output[0] for node in quants), TensorProto.INT8)
    read_from(proto, {name: f"{name}__quantized" for name in given})
    twins = [_twin(node) for node in quants if node.output[0] in given]
    nodes = [*twins, *map(copy.deepcopy, proto.graph.node)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    add_inputs(proto, (twin.input[0] for twin in twins))
    executor = AscendExecutor(proto)
    arrays = executor.run({**inputs, **{given_name(name): v for name, v in given.items()}})
    values = dict(zip(executor.output_names, arrays, strict=True))
    tensors = [_traced(node, values[node.output[0]]) for node in quants]
    return Trace(tuple(tensors), {name: values[name] for name in outputs})


def _twin(node: onnx.NodeProto) -> onnx.NodeProto:
    """An AscendQuant of the same numbers that reads what was given."""
    twin = copy.deepcopy(node)
    twin.name = f"{node.name}.given"
    twin.input[:] = [given_name(node.output[0])]
    twin.output[:] = [f"{node.output[0]}__quantized"]
    return twin


def _traced(node: onnx.NodeProto, integers: Array) -> TracedTensor:
    attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    steps, offset = np.float32(attributes["scale"]), int(attributes.get("offset", 0.0))
    if attributes.get("sqrt_mode"):
        steps = steps * steps
    scale = np.float32(1) / steps
    values = (integers.astype(np.float32) - np.float32(offset)) * scale
    return TracedTensor(node.output[0], float(scale), offset, values)
