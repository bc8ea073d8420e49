"""From the neutral description to a graph of integer operators that can be traced.

The walk of this module keeps, for every value of the captured program, what stands for it in the
new graph: a float tensor, or integers with the grid they lie on. Which operator becomes what is
the table of ``_tinynn_forms``.

An integer kernel must know the grid of its result before any quantization is reached. It is found
by reading ahead: through the operators that pass values on, to the ``fake_quantize`` behind.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_qat.export.protocol import Unsupported, UnsupportedByTarget
from lightning_qat.ir.quantized_model import QuantizedModel, QuantizedTensor
from lightning_qat.numerics.fake_quantize import fake_quantize
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat_exporters.tflite.tinynn.ops import OPS
from lightning_qat_exporters.tflite.tinynn.program_values import (
    Recorder,
    constants_of,
    outputs_of,
    placeholder_values,
    sample_of,
)

_FAKE_QUANTIZE = torch.ops.lightning_qat.fake_quantize.default
_DEQUANTIZE = torch.ops.lightning_qat.dequantize.default

INT8 = IntegerGrid.signed(8)
LITERT = 'Export with backend="litert"'


class Refused(Exception):
    """One operator has no form here.

    Args:
        reason: Why, without a full stop.
        remedy: What to do.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True, eq=False)
class Value:
    """What stands for a value of the program in the new graph.

    Args:
        node: A float tensor, or a ``quint8`` one.
        qparams: Its grid; ``None`` for a float tensor.
    """

    node: fx.Node
    qparams: QParams | None


Form = Callable[["Lowering", fx.Node], Value]

_FLOAT_GATES = (
    "LSTM and GRU compute their gates in float; an int8 kernel needs the scale of every product"
)


class Lowering:
    """One walk over a program.

    Args:
        model: The neutral description.
        forms: Which operator becomes what.
        passing: Operators whose result lies on the grid of what they are given.
        integer_io: Inputs and outputs are integers.
    """

    def __init__(
        self,
        model: QuantizedModel,
        forms: Mapping[Any, Form],
        passing: Container[Any],
        integer_io: bool,
    ) -> None:
        self.model, self.forms, self.passing, self.integer_io = model, forms, passing, integer_io
        # In-place operators become plain ones; nothing else is taken apart.
        self.program = model.program.run_decompositions({})
        self.inputs = sample_of(model, self.program)
        self.constants = constants_of(self.program)
        recorder = Recorder(self.program.graph_module)
        with torch.no_grad():
            recorder.run(*placeholder_values(self.program, self.constants, self.inputs))
        self.recorded = recorder.recorded
        self.root, self.graph = nn.Module(), fx.Graph()
        self.values: dict[fx.Node, Value] = {}
        self.fused: set[fx.Node] = set()
        self.problems: list[Unsupported] = []

    def run(self) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
        """The new graph, and inputs to trace it with.

        Raises:
            UnsupportedByTarget: With everything that has no form.
        """
        samples = []
        recurrent = self.model.recurrences
        inside = {node for call in recurrent for node in call.nodes(self.program)}
        self.problems += [Unsupported(c.name or c.kind, _FLOAT_GATES, LITERT) for c in recurrent]
        for name, sample in self.inputs.items():
            source = next(n for n in self.program.graph.nodes if n.name == name)
            placeholder = self.graph.placeholder(name)
            qparams = self._checked(name, self._input_grid, source)
            self.values[source] = Value(placeholder, qparams)
            samples.append(sample if qparams is None else _as_quint8(sample, qparams))
        for node in self.program.graph.nodes:
            if node.op == "call_function" and self._is_tensor(node):
                told = node in inside
                value = None if told else self._checked(self.where(node), self._lower, node)
                # What was refused is taken as float, so that the rest is looked at too.
                self.values[node] = value or Value(self.graph.placeholder(node.name), None)
        outputs = tuple(
            self._checked(name, self._output, node)
            for name, node in zip(self.model.output_names, outputs_of(self.program), strict=True)
        )
        if self.problems:
            raise UnsupportedByTarget("tflite", tuple(dict.fromkeys(self.problems)))
        self.graph.output(outputs)
        return fx.GraphModule(self.root, self.graph), tuple(samples)

    # What forms ask

    def where(self, node: fx.Node) -> str:
        """The dotted path of the module that called an operator, with the operator's name.

        A quantization is named by its key.
        """
        if node.target is _FAKE_QUANTIZE:
            return str(node.args[-1])
        stack = node.meta.get("nn_module_stack") or {}
        paths = [str(path).split("@")[0] for path, _ in stack.values()]
        path = paths[-1] if paths else ""
        operator = str(node.target).removeprefix("aten.").split(".")[0]
        return f"{path} ({operator})" if path else operator

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a value."""
        return tuple(self.recorded[node])

    def concrete(self, argument: Any) -> Any:
        """An argument with sizes as numbers and values as nodes of the new graph."""
        return fx.map_arg(argument, self._concrete)

    def value(self, argument: Any) -> Value | None:
        """What stands for an argument; ``None`` for a number."""
        if not isinstance(argument, fx.Node):
            return None
        if argument not in self.values:
            if argument not in self.constants:
                return None
            self.values[argument] = Value(self.attribute(self.constants[argument]), None)
        return self.values[argument]

    def quantized(self, *arguments: Any) -> list[tuple[fx.Node, QParams]] | None:
        """The arguments as integers and grids; ``None`` unless all are integers."""
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
        if not isinstance(argument, fx.Node) or argument.target is not _DEQUANTIZE:
            return None
        return self.model.tensors[str(argument.args[-1])]

    def grid_behind(self, node: fx.Node) -> QParams | None:
        """The grid that a result is put on; ``None`` when something reads it as it is.

        A result that is put on several grids gets the widest, from which the others follow.
        """
        grids = self._grids_behind(node)
        if not grids or None in grids:
            return None
        return max((g for g in grids if g is not None), key=lambda g: float(g.scale))

    def only_reader(self, node: fx.Node) -> fx.Node | None:
        """The one operator that reads a result."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    # What forms build

    def call(self, operator: Any, *args: Any) -> fx.Node:
        """Add an operator to the new graph."""
        return self.graph.call_function(operator, args)

    def emit(self, operator: Any, *args: Any, qparams: QParams) -> Value:
        """Add one of our integer operators; its last arguments are the grid of its result."""
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

    def attribute(self, tensor: Tensor) -> fx.Node:
        """A constant of the new graph."""
        name = f"constant_{len(self.root._buffers)}"
        # TorchScript refuses a tensor under two names.
        self.root.register_buffer(name, tensor.clone())
        return self.graph.get_attr(name)

    def constant(self, values: Tensor, qparams: QParams) -> fx.Node:
        """Integers of the new graph that stand for some real values."""
        return self.attribute(_as_quint8(values, qparams))

    def integers(self, tensor: QuantizedTensor) -> fx.Node:
        """A quantized constant of the new graph."""
        qparams = tensor.qparams
        assert tensor.integers is not None
        return self.constant(tensor.integers * qparams.scale, qparams)

    def on_grid(self, value: Value, qparams: QParams) -> Value:
        """A value moved to a grid."""
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
            node.target is not _DEQUANTIZE
        )

    def _lower(self, node: fx.Node) -> Value:
        if node.target is _FAKE_QUANTIZE:
            return self._fake_quantize(node)
        form = self.forms.get(node.target)
        if form is None:
            raise Refused(f"{node.target} has no form in TinyNeuralNetwork's backend", LITERT)
        return form(self, node)

    def _fake_quantize(self, node: fx.Node) -> Value:
        source, qparams = self.value(node.args[0]), self._grid_of(node)
        if qparams.grid != INT8:
            raise Refused(
                f"activations must have 8 bits; got the grid {qparams.grid.qmin} .. "
                f"{qparams.grid.qmax}",
                "Use ActivationSpec(bits=8)",
            )
        assert source is not None
        return self.on_grid(source, qparams)

    def _grid_of(self, node: fx.Node) -> QParams:
        return self.model.tensors[str(node.args[-1])].qparams

    def _grids_behind(self, node: fx.Node) -> list[QParams | None]:
        grids: list[QParams | None] = []
        for user in node.users:
            if user.target is _FAKE_QUANTIZE:
                grids.append(self._grid_of(user))
            elif user.target in self.passing:
                # `copy` overwrites its first argument: nothing of it is read.
                if user.target is not torch.ops.aten.copy.default or user.args[0] is not node:
                    grids += self._grids_behind(user)
            elif not isinstance(self.recorded.get(user), int):
                # Asking for a size reads no value.
                grids.append(None)
        return grids

    def _input_grid(self, node: fx.Node) -> QParams | None:
        if not self.integer_io:
            return None
        grids = self._grids_behind(node)
        first = grids[0] if grids else None
        if first is None or not all(g is not None and g.equal(first) for g in grids):
            raise Refused(
                "an integer input must be quantized, and once, before anything reads it",
                'Use io="float"',
            )
        return first

    def _output(self, node: fx.Node) -> fx.Node:
        value = self.value(node)
        if value is not None and value.qparams is None and self.integer_io:
            raise Refused(
                "an integer output must be quantized",
                'Prepare with Recipe(outputs=True), or use io="float"',
            )
        return value.node if value and self.integer_io else self.real(node)

    def _checked(self, layer: str, step: Callable[[fx.Node], Any], node: fx.Node) -> Any:
        try:
            return step(node)
        except Refused as refused:
            self.problems.append(Unsupported(layer, refused.reason, refused.remedy))
            return None


def arguments_of(node: fx.Node, *defaults: Any) -> tuple[Any, ...]:
    """The positional arguments of an operator, the missing ones from their defaults."""
    given: tuple[Any, ...] = node.args
    return (*given, *defaults[len(given) :])


def affine(qparams: QParams) -> tuple[float, int]:
    """Scale and zero point as torch's ``quint8`` has them: moved up by 128, the same numbers."""
    return float(qparams.scale), int(qparams.zero_point) + 128


def _as_quint8(values: Tensor, qparams: QParams) -> Tensor:
    # On the grid already, so that torch's own rounding has nothing to decide.
    real = fake_quantize(values.float(), qparams.scale, qparams.zero_point, qparams.grid)
    return torch.quantize_per_tensor(real, *affine(qparams), torch.quint8)
