"""Values of a captured program: constants, placeholders, outputs, samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from lightning_qat.ir.quantized_model import QuantizedModel


class Recorder(fx.Interpreter):
    """Runs a program and keeps every shape and every number."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.recorded: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten.view.default:
            # Without in-place operators, a view may meet strides that only reshape can read.
            args: Any = self.fetch_args_kwargs_from_env(n)[0]
            result = torch.reshape(*args)
        else:
            result = super().run_node(n)
        self.recorded[n] = result.shape if isinstance(result, Tensor) else result
        return result


def constants_of(program: ExportedProgram) -> dict[fx.Node, Tensor]:
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    values: dict[str, Any] = {**program.state_dict, **program.constants}
    return {
        node: values[names[node.name]].detach()
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    }


def sample_of(model: QuantizedModel, program: ExportedProgram) -> dict[str, Tensor]:
    """The example inputs; one sample of them where the batch is dynamic."""
    args, kwargs = model.example_inputs
    dynamic = {
        node.name: bool(val.shape) and isinstance(val.shape[0], torch.SymInt)
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(val := node.meta.get("val"), Tensor)
    }
    return {
        name: value[:1] if dynamic[name] else value
        for name, value in model.flat_inputs(args, kwargs).items()
    }


def placeholder_values(
    program: ExportedProgram, constants: Mapping[fx.Node, Tensor], inputs: Mapping[str, Tensor]
) -> list[Any]:
    return [
        constants[node] if node in constants else inputs.get(node.name)
        for node in program.graph.nodes
        if node.op == "placeholder"
    ]


def outputs_of(program: ExportedProgram) -> list[fx.Node]:
    values: Any = program.graph.output_node().args[0]
    specs = program.graph_signature.output_specs
    return [
        value
        for spec, value in zip(specs, values, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT and isinstance(value, fx.Node)
    ]
