"""The converted model: plain frozen data that every exporter reads."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lightning_qat.atomic_write import late_errors, replacing
from lightning_qat.ir.archive.check import Untrusted
from lightning_qat.ir.archive.read import (
    EXTRA_FILE,
    FORMAT_VERSION,
    NewerFormatError,
    read_archive,
    told,
)
from lightning_qat.ir.exported_program import Constants, with_plain_outputs
from lightning_qat.ir.finite import not_finite
from lightning_qat.ir.ops import (
    as_dequantize,
    as_fake_quantize,
    layer_of_weight_key,
    layer_operands,
)
from lightning_qat.ir.quantize_calls import QuantizeCall, quantize_calls, run_watched
from lightning_qat.ir.recurrence import Recurrence, recurrences_of_old_file
from lightning_qat.ir.shapes import Size, input_shapes
from lightning_qat.numerics.arithmetic import channel_groups
from lightning_qat.numerics.qparams import IntegerGrid, QParams


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One quantized tensor of a model.

    Args:
        key: ``<layer>.input`` or ``<layer>.weight``, with the layer's dotted module path.
        kind: What the tensor is.
        qparams: Its scale, zero point and grid.
        integers: The weight's integers; ``None`` for an activation.

    Raises:
        ValueError: Integers outside the grid, or an axis that does not fit them.
    """

    key: str
    kind: Literal["activation", "weight"]
    qparams: QParams
    integers: Tensor | None = None

    def __post_init__(self) -> None:
        if self.integers is None:
            return
        grid, axis = self.qparams.grid, self.qparams.axis
        if self.integers.numel():
            low, high = int(self.integers.min()), int(self.integers.max())
            if low < grid.qmin or high > grid.qmax:
                raise ValueError(f"{self.key!r}: integers must lie in {grid}; got {low} .. {high}.")
        count, shape = self.qparams.scale.numel(), tuple(self.integers.shape)
        groups = channel_groups(self.qparams.scale, shape, axis)
        fits = axis is None or (count == groups * shape[axis] and shape[0] % groups == 0)
        if not fits or (groups > 1 and axis != 1):
            raise ValueError(
                f"{self.key!r}: one scale per channel of axis {axis} is needed; got {count} "
                f"scales for shape {shape}. A grouped transposed convolution has one per channel "
                "of each group."
            )


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """One call of a layer with quantized weight, in a converted model.

    Args:
        name: Dotted path of the layer, or of the module that multiplies and the product's name.
        input_key: Key of its quantized input.
        weight_key: Key of its quantized weight.
        bias: Its float bias with batch norm folded; ``None`` without one.
        node: Name of its node in the program's graph.
    """

    name: str
    input_key: str
    weight_key: str
    bias: Tensor | None
    node: str


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A trained model with every number final.

    The program computes in float what an integer target computes in integers: every quantized
    activation passes a ``lightning_qat::fake_quantize`` node, every quantized weight is an integer
    constant behind a ``lightning_qat::dequantize`` node, batch norm is folded.

    Args:
        program: The captured graph, in eval mode, on the CPU.
        input_names: One name per tensor input, in the order of the flattened inputs.
        output_names: One name per tensor output, in the order of the flattened outputs.
        recipe: The recipe as primitives, for the record; may be empty.
        recurrences: Every LSTM and GRU whose steps are unrolled, in the order of the graph.
        unreached: Keys of planned tensors that the captured forward never reaches.
        constant_layers: Layers that depend on no input; the program holds their results.

    Raises:
        ValueError: The program breaks a rule of ``QParams`` or ``QuantizedTensor``, or holds
            weights, biases or other constants that are not finite; all of those are named.
    """

    program: ExportedProgram
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recurrences: tuple[Recurrence, ...] = ()
    unreached: tuple[str, ...] = ()
    constant_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self.tensors
        problems = not_finite(self.program)
        problems += [
            f"{layer.name}: its bias is not finite once batch norm is folded into it"
            for layer in self.layers
            if layer.bias is not None and not bool(torch.isfinite(layer.bias).all())
        ]
        if problems:
            raise ValueError(
                f"Every constant of a converted model must be finite: {'; '.join(problems)}. "
                "Training has diverged, or the file is damaged."
            )

    @cached_property
    def tensors(self) -> Mapping[str, QuantizedTensor]:
        """Every quantized tensor by its key, in the order of the graph."""
        found: dict[str, QuantizedTensor] = {}
        constants = Constants(self.program)
        for node in self.program.graph.nodes:
            activation, weight = as_fake_quantize(node), as_dequantize(node)
            if activation is not None and activation.key not in found:
                key = activation.key
                scale = _constant(constants, activation.scale, key)
                zero_point = _constant(constants, activation.zero_point, key)
                qparams = _qparams(key, scale, zero_point, activation.grid)
                found[key] = QuantizedTensor(key, "activation", qparams)
            elif weight is not None and weight.key not in found:
                key = weight.key
                scale = _constant(constants, weight.scale, key)
                zero_point = torch.zeros_like(scale, dtype=torch.int32)
                qparams = _qparams(key, scale, zero_point, weight.grid, weight.axis)
                integers = _constant(constants, weight.integers, key)
                found[key] = QuantizedTensor(key, "weight", qparams, integers)
        return found

    @cached_property
    def layers(self) -> tuple[QuantizedLayer, ...]:
        """Every call of a layer whose input and weight are quantized, in the order of the graph."""
        found = []
        constants = Constants(self.program)
        for node in self.program.graph.nodes:
            operands = layer_operands(node)
            if operands is not None:
                source, weight = operands
                bias = constants.value(node.args[2]) if len(node.args) > 2 else None
                path = layer_of_weight_key(weight.key)
                found.append(QuantizedLayer(path, source.key, weight.key, bias, node.name))
        return tuple(found)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all numbers, with their names: the same again for a file that was loaded."""
        digest = hashlib.sha256(repr((self.input_names, self.output_names)).encode())
        constants = {**self.program.state_dict, **self.program.constants}
        for name, value in sorted(constants.items()):
            if isinstance(value, Tensor):
                digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
                digest.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def input_shapes(self) -> Mapping[str, tuple[Size, ...]]:
        """The shape of every input by its name: fixed sizes as ints, dynamic ones by a name."""
        return input_shapes(self.program)

    @cached_property
    def output_steps(self) -> Mapping[str, float]:
        """The scale of every output that is quantized, by its name."""
        values: Any = self.program.graph.output_node().args[0]
        nodes = [value for value in values if isinstance(value, fx.Node)]
        calls = {n: as_fake_quantize(v) for n, v in zip(self.output_names, nodes, strict=True)}
        return {
            name: float(self.tensors[call.key].qparams.scale)
            for name, call in calls.items()
            if call is not None
        }

    @property
    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword inputs that the graph was captured with."""
        args, kwargs = self.program.example_inputs or ((), {})
        return args, dict(kwargs)

    @cached_property
    def _module(self) -> fx.GraphModule:
        return self.program.module()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model: the reference that files are compared with.

        An input that the graph does not need may be given, be ``None`` or be missing.

        Raises:
            ValueError: A size differs that the conversion fixed, such as the length of a sequence.
        """
        args, named = self._needed(args, kwargs)
        with torch.no_grad():
            try:
                return self._module(*args, **named)
            except AssertionError as error:
                # How torch.export's own guards speak.
                raise ValueError(
                    "Inputs must have the sizes of the example that the model was converted with, "
                    f"but for a dynamic batch: {error}. A recurrent layer's steps are unrolled "
                    "for the example's length. Call convert with an example of the size wanted."
                ) from error

    @cached_property
    def calls(self) -> tuple[QuantizeCall, ...]:
        """Every quantization of an activation, in the order of the graph."""
        return quantize_calls(self.program)

    def watched(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        watch: Callable[[QuantizeCall, Tensor, Tensor], None],
    ) -> dict[str, Tensor]:
        """Run the model, look at every activation, and return the tensor outputs by name.

        Args:
            args: Positional inputs.
            kwargs: Keyword inputs.
            watch: Called for each of ``calls`` with its tensor before and after quantization.
        """
        waiting = iter(self.calls)
        with torch.no_grad():
            outputs = run_watched(
                self._module,
                self._leaves(args, kwargs),
                lambda before, after: watch(next(waiting), before, after),
            )
        return self.flat_outputs(outputs)

    def flat_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensor inputs of a call by name, as a runtime wants them."""
        tensors = [leaf for leaf in self._leaves(args, kwargs) if isinstance(leaf, Tensor)]
        return dict(zip(self.input_names, tensors, strict=True))

    def _leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        args, kwargs = self._needed(args, kwargs)
        order = {name: kwargs[name] for name in self.example_inputs[1] if name in kwargs}
        return pytree.tree_leaves((args, {**order, **kwargs}))

    def _needed(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """A call with ``None`` wherever the example has it: what the graph does not need."""
        example_args, example_kwargs = self.example_inputs
        if all(leaf is not None for leaf in pytree.tree_leaves((example_args, example_kwargs))):
            return args, kwargs
        args = (*args, *(None for value in example_args[len(args) :] if value is None))
        unneeded = {name: None for name, value in example_kwargs.items() if value is None}
        kwargs = {**unneeded, **kwargs}
        kwargs = {**{name: kwargs[name] for name in example_kwargs if name in kwargs}, **kwargs}
        try:
            args, kwargs = pytree.tree_map(
                lambda example, given: None if example is None else given,
                (example_args, example_kwargs),
                (args, kwargs),
            )
        except ValueError:
            pass  # torch names what is missing or too much
        return args, kwargs

    def flat_outputs(self, outputs: Any) -> dict[str, Tensor]:
        """The tensor outputs of a call by name."""
        tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
        return dict(zip(self.output_names, tensors, strict=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        """Copy the model, without what was computed of it: that holds nodes of this program."""
        return replace(self, program=copy.deepcopy(self.program, memo))

    def save(self, path: str | Path) -> None:
        """Write the model to one file, atomically; ``QuantizedModel.load`` reads it.

        What is read returns dicts in the place of named tuples.

        Raises:
            OSError: The file cannot be written; what was there before stays.
        """
        facts = {
            "format_version": FORMAT_VERSION,
            "input_names": self.input_names,
            "output_names": self.output_names,
            "recipe": self.recipe,
            "recurrences": [asdict(recurrence) for recurrence in self.recurrences],
            "unreached": self.unreached,
            "constant_layers": self.constant_layers,
        }
        with (
            replacing(Path(path)) as temporary,
            with_plain_outputs(self.program) as program,
            late_errors(temporary) as file,
        ):
            torch.export.save(program, file, extra_files={EXTRA_FILE: json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, *, trust: bool = False) -> QuantizedModel:
        """Read a model that ``save`` wrote.

        A file of this format can run code when torch loads it, so every part of it is looked at
        first; see ``lightning_qat.ir.archive``. A model of a file that passes is numbers and
        operators: running it takes what its graph asks for.

        Args:
            path: The file.
            trust: Leave the check out: for your own files whose graph calls operators of a
                library of your own, or whose example inputs hold objects.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no converted model, it could run code, it claims more than it holds,
                or it is of a newer format.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"There is no converted model at {str(path)!r}.")
        try:
            program, facts = read_archive(file, trust=trust)
            model = cls(
                program,
                facts.input_names,
                facts.output_names,
                facts.recipe,
                recurrences_of_old_file(program)
                if facts.recurrences is None
                else facts.recurrences,
                facts.unreached,
                facts.constant_layers,
            )
            model._require_whole()
        except (MemoryError, OSError, NewerFormatError):
            raise
        except Untrusted as error:
            raise ValueError(
                f"{str(path)!r} is not a model that QuantizedModel.save wrote: {error}. If it is "
                "your own, or you trust who made it, pass trust=True: it is then loaded without a "
                "look at it, and may run any code."
            ) from error
        except Exception as error:  # torch's reader and a graph without sense raise many kinds
            raise ValueError(
                f"{str(path)!r} is not a model that QuantizedModel.save wrote: {told(error)}"
            ) from error
        return model

    def _require_whole(self) -> None:
        """Look at everything that exporters read, so that they may rely on it.

        Raises:
            Exception: Of many kinds, where the graph is not one that ``convert`` makes.
        """
        args, kwargs = self.example_inputs
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len(tensors) != len(self.input_names):
            raise ValueError(
                f"it must have a name for each of its {len(tensors)} inputs; it has "
                f"{[*self.input_names]}"
            )
        outputs: Any = self.program.graph.output_node().args[0]
        if len([v for v in outputs if isinstance(v, fx.Node)]) != len(self.output_names):
            raise ValueError(
                f"it must have a name for each of its {len(outputs)} outputs; it has "
                f"{[*self.output_names]}"
            )
        _ = self.layers, self.calls, self.input_shapes, self.output_steps


def _constant(constants: Constants, node: object, key: str) -> Tensor:
    value = constants.value(node)
    if value is None:
        raise ValueError(f"{key!r}: scale, zero point and integers must be constants.")
    return value


def _qparams(
    key: str, scale: Tensor, zero_point: Tensor, grid: IntegerGrid, axis: int | None = None
) -> QParams:
    try:
        return QParams(scale, zero_point, grid, axis)
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from error
