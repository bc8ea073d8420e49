"""Scales and zero points that a QDQ model computes from constants, made constants.

A QAT model that was captured while its weights train finds their scales in the graph:
``max(|w|) / 127``. Exporters fold that for small weights and leave it for large ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.onnx_files.graph_writer import initializer


class FoldQParams(ir.passes.InPlacePass):
    """Make scales and zero points initializers, where constants alone determine them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place; what depends on an input stays as it is."""
        opsets = dict(model.graph.opset_imports)
        known: dict[ir.Value, Array | None] = {}
        modified = False
        for node in model.graph:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.domain:
                continue
            for index, value in enumerate(node.inputs[1:3], start=1):
                if value is None or ir.convenience.get_const_tensor(value) is not None:
                    continue
                array = _computed(value, opsets, known)
                if array is not None:
                    folded = initializer(model.graph, f"{value.name}.folded", array)
                    node.replace_input_with(index, folded)
                    modified = True
        return ir.passes.PassResult(model, modified=modified)


def _computed(
    value: ir.Value, opsets: dict[str, int], known: dict[ir.Value, Array | None]
) -> Array | None:
    """The value of what constants alone determine; ``None`` for anything else."""
    if value in known:
        return known[value]
    known[value] = None
    tensor = ir.convenience.get_const_tensor(value)
    node = value.producer()
    if tensor is not None:
        known[value] = tensor.numpy()
    elif node is not None and not node.domain:
        inputs = [None if v is None else _computed(v, opsets, known) for v in node.inputs]
        given = [v for v in node.inputs if v is not None]
        if given and all(known[v] is not None for v in given):
            names = [None if v is None else f"i{i}" for i, v in enumerate(node.inputs)]
            proto = ir.to_proto(node)
            proto.input[:] = [name or "" for name in names]
            feeds = {n: a for n, a in zip(names, inputs, strict=True) if n is not None}
            results: Any = ReferenceEvaluator(proto, opsets=opsets).run(None, feeds)
            known.update(
                (output, np.asarray(result))
                for output, result in zip(node.outputs, results, strict=True)
            )
    return known[value]
