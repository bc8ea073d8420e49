"""Spell spatial means as GlobalAveragePool, the form that integer runtimes fuse."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lightning_qat_exporters.onnx_files.graph_writer import array_of, initializer


def global_average_pools(graph: ir.Graph) -> None:
    """Turn every ReduceMean over all spatial axes into GlobalAveragePool, in place.

    ``torch`` writes adaptive pooling to size 1 and ``mean`` over height and width as ReduceMean,
    for which ONNX Runtime has no integer kernel. Without ``keepdims`` a Reshape follows.
    """
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "ReduceMean" else None
        rank = None if source is None or source.shape is None else source.shape.rank()
        axes = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if source is None or rank is None or rank < 3 or axes is None:
            continue
        if sorted(axis % rank for axis in axes.tolist()) != list(range(2, rank)):
            continue
        keeps = node.attributes.get_int("keepdims", 1)
        pool = ir.Node("", "GlobalAveragePool", [source])
        pool.metadata_props.update(node.metadata_props)
        result = pool.outputs[0]
        result.name = f"{node.outputs[0].name}.pooled"
        result.type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(node, pool)
        if not keeps:
            # Not Flatten: ONNX Runtime moves QuantizeLinear before a Reshape only.
            shape = initializer(graph, "batch_and_channels", np.array([0, -1], np.int64))
            reshape = ir.Node("", "Reshape", [result, shape])
            reshape.metadata_props.update(node.metadata_props)
            graph.insert_before(node, reshape)
            result = reshape.outputs[0]
            result.type = ir.TensorType(ir.DataType.FLOAT)
        old = node.outputs[0]
        result.name, old.name = old.name, None
        result.shape = old.shape
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
