"""Lower a converted model to a graph of integer operators that can be traced.

``Lowering`` goes through the captured program and keeps, for every value, its counterpart in the
new graph: a float tensor, or integers with their qparams. The tables of ``lower_ops`` and
``lower_value_preserving`` have one function per operator.

An integer kernel needs the qparams of its output before their ``fake_quantize`` node is reached.
``Lowering.output_qparams`` reads ahead, through value-preserving operators, to that node.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_qat.export.protocol import CannotExpress, Unsupported, UnsupportedByTarget
from lightning_qat.ir.exported_program import Constants, module_path
from lightning_qat.ir.ops import DEQUANTIZE, FakeQuantizeCall, as_dequantize, as_fake_quantize
from lightning_qat.ir.quantized_model import QuantizedModel, QuantizedTensor
from lightning_qat.numerics.fake_quantize import fake_quantize
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat_exporters.tflite.decompose.sample import sample_of
from lightning_qat_exporters.tflite.decompose.squeeze import name_squeezed_axes
from lightning_qat_exporters.tflite.notes import joins_are_planned
from lightning_qat_exporters.tflite.tinynn.ops import OPS
from lightning_qat_exporters.tflite.tinynn.program_values import (
    Recorder,
    outputs_of,
    placeholder_values,
)

INT8 = IntegerGrid.signed(8)
LITERT = 'Export with backend="litert"'


@dataclass(frozen=True, eq=False)
class Value:
    """The counterpart of a value of the program in the new graph.

    Args:
        node: A float tensor, or a ``quint8`` one.
        qparams: Its scale, zero point and grid; ``None`` for a float tensor.
    """

    node: fx.Node
    qparams: QParams | None


LowerFunction = Callable[["Lowering", fx.Node], Value]
"""Lowers one operator of the program."""

_NEEDS_OUTPUT = "an int8 kernel needs the scale of its output, which is not quantized"
_FLOAT_GATES = (
    "LSTM and GRU compute their gates in float; an int8 kernel needs the scale of every product"
)


class Lowering:
    """One walk over a program.

    Args:
        model: The converted model.
        functions: Operator to the function that lowers it.
        value_preserving: Operators whose output has the qparams of their input.
        integer_io: Inputs and outputs are integers.
    """

    def __init__(
        self,
        model: QuantizedModel,
        functions: Mapping[Any, LowerFunction],
        value_preserving: Container[Any],
        integer_io: bool,
    ) -> None:
        self.model, self.integer_io = model, integer_io
        self.functions, self.value_preserving = functions, value_preserving
        # In-place operators become plain ones; nothing else is taken apart.
        self.program = model.program.run_decompositions({})
        name_squeezed_axes(self.program.graph)
        self.inputs = sample_of(model)
        self.constants = Constants(self.program)
        recorder = Recorder(self.program.graph_module, self.inputs)
        with torch.no_grad():
            recorder.run(*placeholder_values(self.program, self.constants, self.inputs))
        self.recorded, self.computed = recorder.recorded, recorder.constant
        self.root, self.graph = nn.Module(), fx.Graph()
        self.values: dict[fx.Node, Value] = {}
        self.fused: set[fx.Node] = set()
        self.problems: list[Unsupported] = []

    def run(self) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
        """The new graph, and inputs to trace it with.

        Raises:
            UnsupportedByTarget: With everything that cannot be lowered.
        """
        samples = []
        recurrent = self.model.recurrences
        inside = {node for call in recurrent for node in call.nodes(self.program)}
        self.problems += [Unsupported(c.name or c.kind, _FLOAT_GATES, LITERT) for c in recurrent]
        for name, sample in self.inputs.items():
            source = next(n for n in self.program.graph.nodes if n.name == name)
            placeholder = self.graph.placeholder(name)
            qparams = self._checked(name, self._input_qparams, source)
            self.values[source] = Value(placeholder, qparams)
            samples.append(sample if qparams is None else _as_quint8(sample, qparams))
        for node in self.program.graph.nodes:
            if node.op == "call_function" and self._is_tensor(node) and node not in self.computed:
                # What cannot be lowered counts as float, so that the rest is checked too.
                where = self.where(node)
                value = None if node in inside else self._checked(where, self._lower, node)
                self.values[node] = value or Value(self.graph.placeholder(node.name), None)
        outputs = tuple(
            self._checked(name, self._output, node)
            for name, node in zip(self.model.output_names, outputs_of(self.program), strict=True)
        )
        if self.problems:
            raise UnsupportedByTarget("tflite", tuple(dict.fromkeys(self.problems)))
        self.graph.output(outputs)
        return fx.GraphModule(self.root, self.graph), tuple(samples)

    # For functions that lower an operator

    def where(self, node: fx.Node) -> str:
        """The dotted path of the module that called an operator, with the operator's name.

        A quantization is named by its key.
        """
        call = as_fake_quantize(node)
        if call is not None:
            return call.key
        path = module_path(node)
        operator = str(node.target).removeprefix("aten.").split(".")[0]
        return f"{path} ({operator})" if path else operator

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a value."""
        return tuple(self.recorded[node])

    def concrete(self, argument: Any) -> Any:
        """An argument with sizes as numbers and values as nodes of the new graph."""
        return fx.map_arg(argument, self._concrete)

    def value(self, argument: Any) -> Value | None:
        """The counterpart of an argument; ``None`` for a number."""
        if not isinstance(argument, fx.Node):
            return None
        if argument not in self.values:
            constant = self.constant(argument)
            if constant is None:
                return None
            self.values[argument] = Value(self.attribute(constant), None)
        return self.values[argument]

    def constant(self, argument: fx.Node) -> Tensor | None:
        """The values of an argument that depend on no input; ``None``: they depend on one."""
        return self.computed.get(argument, self.constants.value(argument))

    def quantized(self, *arguments: Any) -> list[tuple[fx.Node, QParams]] | None:
        """The arguments as integers and qparams; ``None`` unless all are integers."""
        values = [self.value(argument) for argument in arguments]
        pairs = [(v.node, v.qparams) for v in values if v is not None and v.qparams is not None]
        return pairs if len(pairs) == len(arguments) else None

    def real(self, argument: Any) -> Any:
        """The argument as a float node of the new graph; numbers stay as they are."""
        value = self.value(argument)
        if value is None:
            return self.concrete(argument)
        if value.qparams is None:
            return value.node
        return self.call(torch.ops.aten.dequantize.self, value.node)

    def weight(self, argument: Any) -> QuantizedTensor | None:
        """The quantized weight that a node holds; ``None`` for anything else."""
        call = as_dequantize(argument)
        return None if call is None else self.model.tensors[call.key]

    def output_qparams(self, node: fx.Node) -> QParams | None:
        """The qparams that an output is quantized with; ``None`` when something reads it in float.

        An output that is quantized with several gets the largest scale, and is requantized from
        that.
        """
        read = [qparams for _, qparams in self._reads(node)]
        if not read or None in read:
            return None
        return max((q for q in read if q is not None), key=lambda q: float(q.scale))

    def not_quantized(self, node: fx.Node) -> CannotExpress:
        """Why an output has no qparams: what reads it in float, and what to do about that."""
        readers = [reader for reader, qparams in self._reads(node) if qparams is None]
        reasons = dict.fromkeys(self._why_float(reader) for reader in readers)
        # Where the recipe has them, or where an operator has no form, no other recipe helps.
        formless = any(r.op != "output" and r.target not in self.functions for r in readers)
        helps = not formless and not joins_are_planned(self.model)
        remedy = f"Prepare with Recipe(joins=True, outputs=True). {LITERT}" if helps else LITERT
        return CannotExpress(f"{_NEEDS_OUTPUT}; {'; '.join(reasons)}", remedy)

    def only_reader(self, node: fx.Node) -> fx.Node | None:
        """The one operator that reads a result."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    # What forms build

    def call(self, operator: Any, *args: Any) -> fx.Node:
        """Add an operator to the new graph."""
        return self.graph.call_function(operator, args)

    def emit(self, operator: Any, *args: Any, qparams: QParams) -> Value:
        """Add one of our integer operators, which ends with scale and zero point of its output."""
        return Value(self.call(operator, *args, *affine(qparams)), qparams)

    def emit_layer(self, operator: Any, *args: Any, qparams: QParams, key: str) -> Value:
        """Add one of our layers, which ends with the name of its weight."""
        return Value(self.call(operator, *args, *affine(qparams), key), qparams)

    def as_float(self, node: fx.Node) -> Value:
        """The same operator in float, on real inputs."""
        args = tuple(self.real(argument) for argument in node.args)
        kwargs = {name: self.real(argument) for name, argument in node.kwargs.items()}
        target: Any = node.target
        return Value(self.graph.call_function(target, args, kwargs), None)

    def given(self, node: fx.Node) -> Value:
        """The counterpart of an operator's first argument."""
        value = self.value(node.args[0])
        assert value is not None
        return value

    def moved(self, node: fx.Node, target: Any, *options: Any) -> Value:
        """An operator on the first argument, with the node's own options or others.

        The result has the qparams of the argument.
        """
        value = self.given(node)
        args = options or tuple(self.concrete(argument) for argument in node.args[1:])
        kwargs = {} if options else {k: self.concrete(v) for k, v in node.kwargs.items()}
        call = self.graph.call_function(target, (value.node, *args), kwargs)
        return Value(call, value.qparams)

    def attribute(self, tensor: Tensor) -> fx.Node:
        """A constant of the new graph."""
        name = f"constant_{len(self.root._buffers)}"
        # TorchScript refuses a tensor under two names.
        self.root.register_buffer(name, tensor.clone())
        return self.graph.get_attr(name)

    def on_grid(self, values: Tensor, qparams: QParams) -> fx.Node:
        """Integers of the new graph that stand for some real values."""
        return self.attribute(_as_quint8(values, qparams))

    def integers(self, tensor: QuantizedTensor) -> fx.Node:
        """A quantized constant of the new graph."""
        qparams = tensor.qparams
        assert tensor.integers is not None
        return self.on_grid(tensor.integers * qparams.scale, qparams)

    def requantized(self, value: Value, qparams: QParams) -> Value:
        """A value with other qparams, or a float tensor quantized."""
        if value.qparams is None:
            quantizer = torch.ops.aten.quantize_per_tensor.default
            node = self.call(quantizer, value.node, *affine(qparams), torch.quint8)
            return Value(node, qparams)
        if value.qparams.equal(qparams):
            return value
        return self.emit(OPS.unary.default, value.node, "none", qparams=qparams)

    def _concrete(self, node: fx.Node) -> Any:
        value = self.value(node)
        return self.recorded[node] if value is None else value.node

    def _is_tensor(self, node: fx.Node) -> bool:
        return not isinstance(self.recorded.get(node), int | float) and (
            node.target is not DEQUANTIZE
        )

    def _lower(self, node: fx.Node) -> Value:
        call = as_fake_quantize(node)
        if call is not None:
            return self._fake_quantize(call)
        function = self.functions.get(node.target)
        if function is None:
            raise CannotExpress(f"{node.target} has no form in TinyNeuralNetwork's backend")
        return function(self, node)

    def _fake_quantize(self, call: FakeQuantizeCall) -> Value:
        source, qparams = self.value(call.x), self.model.tensors[call.key].qparams
        if qparams.grid != INT8:
            raise CannotExpress(
                f"activations must have 8 bits; got the grid {qparams.grid.qmin} .. "
                f"{qparams.grid.qmax}",
                "Use ActivationSpec(bits=8)",
            )
        assert source is not None
        return self.requantized(source, qparams)

    def _reads(self, node: fx.Node) -> list[tuple[fx.Node, QParams | None]]:
        """Each reader of a tensor, with the qparams it quantizes it with; ``None``: in float."""
        found: list[tuple[fx.Node, QParams | None]] = []
        for user in node.users:
            call = as_fake_quantize(user)
            if call is not None:
                found.append((user, self.model.tensors[call.key].qparams))
            elif user.target in self.value_preserving:
                # `copy` overwrites its first argument: nothing of it is read.
                if user.target is not torch.ops.aten.copy.default or user.args[0] is not node:
                    found += self._reads(user)
            elif not isinstance(self.recorded.get(user), int):
                # Asking for a size reads no value.
                found.append((user, None))
        return found

    def _why_float(self, reader: fx.Node) -> str:
        if reader.op == "output":
            return "it is an output of the model"
        if reader.target in self.functions:
            return f"{self.where(reader)} reads it in float"
        return f"{self.where(reader)}, which has no form here, reads it"

    def _input_qparams(self, node: fx.Node) -> QParams | None:
        if not self.integer_io:
            return None
        read = [qparams for _, qparams in self._reads(node)]
        first = read[0] if read else None
        if first is None or not all(q is not None and q.equal(first) for q in read):
            raise CannotExpress(
                "an integer input must be quantized, and once, before anything reads it",
                'Use io="float"',
            )
        return first

    def _output(self, node: fx.Node) -> fx.Node:
        value = self.value(node)
        if value is not None and value.qparams is None and self.integer_io:
            raise CannotExpress(
                "an integer output must be quantized",
                'Prepare with Recipe(outputs=True), or use io="float"',
            )
        return value.node if value and self.integer_io else self.real(node)

    def _checked(self, layer: str, step: Callable[[fx.Node], Any], node: fx.Node) -> Any:
        try:
            return step(node)
        except CannotExpress as error:
            self.problems.append(Unsupported(layer, error.reason, error.remedy or LITERT))
            return None


def affine(qparams: QParams) -> tuple[float, int]:
    """Scale and zero point as torch's ``quint8`` has them: moved up by 128, the same numbers."""
    return float(qparams.scale), int(qparams.zero_point) + 128


def _as_quint8(values: Tensor, qparams: QParams) -> Tensor:
    # These are multiples of the scale, so that torch's own rounding has nothing to decide.
    real = fake_quantize(values.float(), qparams.scale, qparams.zero_point, qparams.grid)
    return torch.quantize_per_tensor(real, *affine(qparams), torch.quint8)
