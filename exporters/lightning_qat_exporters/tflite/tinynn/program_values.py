"""Values of a captured program: arguments, outputs, shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from lightning_qat.ir.exported_program import Constants
from lightning_qat.ir.ops import DEQUANTIZE, as_fake_quantize
from lightning_qat_exporters.tflite.decompose.constant_nodes import fixed_nodes

_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


class Recorder(fx.Interpreter):
    """Runs a program and records the shape of every tensor and the value of every number.

    Args:
        module: The program's graph module.
        inputs: Names of the model's inputs; every other placeholder is a constant.

    Attributes:
        recorded: Node to shape, or to the number that it gives.
        constant: Node to tensor, of those that depend on no values of an input.
    """

    def __init__(self, module: fx.GraphModule, inputs: Collection[str]) -> None:
        super().__init__(module)
        self.recorded: dict[fx.Node, Any] = {}
        self.constant: dict[fx.Node, Tensor] = {}
        placeholders = {node for node in module.graph.nodes if node.op == "placeholder"}
        fixed = fixed_nodes(module.graph, {n for n in placeholders if n.name not in inputs})
        quantized = {n for n in fixed if n.target is DEQUANTIZE or as_fake_quantize(n) is not None}
        self._fixed = fixed - placeholders - quantized

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and record its result."""
        if n.target in _VIEWS:
            # Without in-place operators, a view may meet strides that only reshape can read.
            args: Any = self.fetch_args_kwargs_from_env(n)[0]
            result = torch.reshape(*args)
        else:
            result = super().run_node(n)
        self.recorded[n] = result.shape if isinstance(result, Tensor) else result
        if n in self._fixed and isinstance(result, Tensor):
            self.constant[n] = result
        return result


def placeholder_values(
    program: ExportedProgram, constants: Constants, inputs: Mapping[str, Tensor]
) -> list[Any]:
    """The arguments of the program's graph module, in order: constants and inputs."""
    return [
        constants.value(node) if constants.name(node) is not None else inputs.get(node.name)
        for node in program.graph.nodes
        if node.op == "placeholder"
    ]


def outputs_of(program: ExportedProgram) -> list[fx.Node]:
    """The nodes of the model's own outputs, in order."""
    values: Any = program.graph.output_node().args[0]
    specs = program.graph_signature.output_specs
    return [
        value
        for spec, value in zip(specs, values, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT and isinstance(value, fx.Node)
    ]
