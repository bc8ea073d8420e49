"""Inline the functions of a model, whose calls may leave out their last inputs."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from lightning_qat_exporters.onnx_files.other_domains import OWN


class InlineFunctions(ir.passes.InPlacePass):
    """Put the nodes of functions in place of their calls.

    A call may leave out inputs at its end; no node of its function may need one of them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place.

        Raises:
            ValueError: A node of a function needs an input that a call leaves out; or two opsets
                or an attribute stand against inlining, in onnx_ir's words.
        """
        if not model.functions:
            return ir.passes.PassResult(model, modified=False)
        common.InlinePass()(model)
        for node in model.graph.all_nodes():
            _check_inputs(node, model.opset_imports.get("", 1))
        return ir.passes.PassResult(model, modified=True)


def _check_inputs(node: ir.Node, opset: int) -> None:
    if node.domain not in OWN or not onnx.defs.has(node.op_type, opset, node.domain):
        return
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    for place in range(schema.min_input):
        if place >= len(node.inputs) or node.inputs[place] is None:
            kind = schema.inputs[min(place, len(schema.inputs) - 1)]
            if kind.option == onnx.defs.OpSchema.FormalParameterOption.Optional:
                continue
            raise ValueError(
                f"{node.name!r} ({node.op_type}) must have its input {kind.name!r}; the call of "
                "the function that it stands in leaves it out."
            )
