"""The quantized activations inside a QDQ file, from ONNX Runtime without optimizations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from lightning_qat.export.protocol import Array
from lightning_qat.export.trace import Trace, TracedTensor
from lightning_qat_exporters.onnx_files.cut import (
    add_inputs,
    given_name,
    loaded,
    read_from,
    show,
)
from lightning_qat_exporters.onnx_files.run import OnnxSession
from lightning_qat_exporters.qdq.translate import keys_of


class _Pair(NamedTuple):
    """What a DequantizeLinear of an activation says."""

    name: str
    scale: float
    zero_point: int
    keys: tuple[str, ...]


def trace_qdq(
    path: Path, runtime: str, inputs: Mapping[str, Array], given: Mapping[str, Array]
) -> Trace:
    """See ``Traceable.trace``; a tensor is named as the value that its DequantizeLinear writes."""
    proto = loaded(path, runtime)
    outputs = [output.name for output in proto.graph.output]
    pairs = list(_pairs(proto))
    show(proto, (pair.name for pair in pairs), TensorProto.FLOAT)
    # An output of the file is read by nobody in it.
    read_from(proto, {name: given_name(name) for name in given})
    add_inputs(proto, map(given_name, given))
    values = OnnxSession(proto.SerializeToString(), optimize=False).run(
        {**inputs, **{given_name(name): value for name, value in given.items()}}
    )
    tensors = (TracedTensor(p.name, p.scale, p.zero_point, values[p.name], p.keys) for p in pairs)
    return Trace(tuple(tensors), {name: values[name] for name in outputs})


def _pairs(proto: onnx.ModelProto) -> Iterator[_Pair]:
    stored = {i.name: i for i in proto.graph.initializer}
    for node in proto.graph.node:
        keys = tuple(keys_of({prop.key: prop.value for prop in node.metadata_props}))
        if node.op_type != "DequantizeLinear" or not keys or node.input[0] in stored:
            continue
        scale, zero_point = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
        shift = 128 if zero_point.dtype == np.uint8 else 0
        yield _Pair(node.output[0], scale.item(), zero_point.item() - shift, keys)
