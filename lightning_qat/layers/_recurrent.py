"""The base class of recurrent layers: sequences, states, and one range for all steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from lightning_qat.function_hooks.running import current_forward_cache, hide_from_hooks
from lightning_qat.layers._layer import QATLayer
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.names import (
    INPUT,
    activation_quantizer_name,
    weight_quantizer_name,
)

State = tuple[Tensor, ...]
"""What one step hands to the next: ``(h, c)`` of an LSTM, ``(h,)`` of a GRU."""

Cell = Callable[[Tensor, State], State]
"""One step: the projected input and the state before it, to the state after it."""


class RecurrentQAT(QATLayer, nn.RNNBase):
    """A recurrent layer; a subclass adds the cell.

    Both directions of a layer read its input through one quantizer: ``input_quantizer`` in the
    first layer, ``input_quantizer_l1`` and so on in the others. Each direction reads its hidden
    state through its own: ``hidden_quantizer_l0``, ``hidden_quantizer_l0_reverse`` and so on.
    """

    opaque = True

    @classmethod
    def weight_names(cls, module: nn.Module) -> tuple[str, ...]:
        """``weight_ih_l0``, ``weight_hh_l0`` and so on."""
        names: Any = module._flat_weights_names
        return tuple(name for name in names if name.startswith("weight"))

    def activation_quantizer_names(self) -> tuple[str, ...]:
        """The first layer's input, as in every QAT layer, then what only recurrent layers have."""
        tensors = ("hidden", "projection") if self.proj_size else ("hidden",)
        name = activation_quantizer_name
        inputs = [name("input", f"_l{layer}") for layer in range(1, self.num_layers)]
        states = [name(tensor, ending) for tensor in tensors for ending in self._endings()]
        return (INPUT, *inputs, *states)

    def _endings(self) -> list[str]:
        """``_l0``, ``_l0_reverse``, ``_l1`` and so on: how torch's parameter names end."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{d}" for layer in range(self.num_layers) for d in directions]

    def reset_parameters(self) -> None:
        """Draw new weights and biases as the float layer does; learned grids stay as they are."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    @abstractmethod
    def _state_sizes(self) -> tuple[int, ...]:
        """Features of each tensor of the state."""

    @abstractmethod
    def _cell(self, ending: str, quantize: Sequence[EveryStep]) -> Cell:
        """One layer's and direction's step; its weights are quantized here, once.

        Args:
            ending: The end of its parameters' names, such as ``_l0_reverse``.
            quantize: The quantizers of its hidden state and, if it has a projection, of the input
                of that.
        """

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over a sequence; arguments and results are those of the float layer.

        Args:
            input: ``(time, batch, input_size)``, with ``batch_first`` ``(batch, time,
                input_size)``, without a batch ``(time, input_size)``, or a ``PackedSequence``.
            hx: The initial state, zeros by default: ``(num_layers * directions, batch, size)``,
                without ``batch`` as ``input``; of an LSTM the pair of hidden and cell state.

        Returns:
            The last layer's hidden states, formed as ``input``, and the final state, as ``hx``.

        Raises:
            ValueError: A shape does not fit.
        """
        forward_cache = current_forward_cache()
        if forward_cache is not None:
            # Read here, because the code below is hidden from the function mode.
            hx = forward_cache.relu_fusion.read_all(hx)
        # Its arithmetic is no join of the model's.
        with hide_from_hooks():
            if not isinstance(input, PackedSequence):
                output, final = self._run(input, self._checked(input, hx, None), None)
                return output, self._formed(final)
            if torch.compiler.is_exporting():
                raise ValueError(
                    "A graph of fixed shapes must get padded sequences; got a packed one, whose "
                    "batch shrinks as its sequences end. Let forward go without "
                    "pack_padded_sequence, and convert with an example for that"
                )
            sizes = input.batch_sizes.tolist()
            state = self._checked(input.data, hx, sizes)
            if state is not None:
                state = _permuted(state, input.sorted_indices)
            output, final = self._run(input.data, state, sizes)
            packed = PackedSequence(
                output, input.batch_sizes, input.sorted_indices, input.unsorted_indices
            )
            return packed, self._formed(_permuted(final, input.unsorted_indices))

    def _formed(self, state: State) -> State | Tensor:
        """The state as the float layer takes and gives it."""
        h, *others = state
        return (h, *others) if others else h

    def _checked(self, x: Tensor, hx: Any, sizes: list[int] | None) -> State | None:
        """The initial state as a tuple, ``None`` for zeros, when all shapes fit."""
        kind, features = self.float_class.__name__, self.input_size
        if x.dim() not in ((2, 3) if sizes is None else (2,)) or x.shape[-1] != features:
            order = "(batch, time" if self.batch_first else "(time, batch"
            raise ValueError(
                f"The input of {kind} must be {order}, {features}), (time, {features}) or packed; "
                f"got the shape {tuple(x.shape)}."
            )
        if sizes is None and x.shape[self._time(x)] == 0:
            raise ValueError(f"A sequence needs at least one step; got {kind} {tuple(x.shape)}.")
        if hx is None:
            return None
        state: State = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        batch = self._batch(x, sizes)
        wanted = [(len(self._endings()), *batch, size) for size in self._state_sizes()]
        shapes = [tuple(part.shape) for part in state]
        if shapes != wanted:
            raise ValueError(
                f"The initial state of {kind} must have the shapes {wanted} for an input of "
                f"{tuple(x.shape)}; got {shapes}."
            )
        return state

    def _time(self, x: Tensor) -> int:
        """The axis of time."""
        return 1 if self.batch_first and x.dim() == 3 else 0

    def _batch(self, x: Tensor, sizes: list[int] | None) -> tuple[int, ...]:
        """``(batch,)``, or nothing for an input without one."""
        if sizes is not None:
            return (sizes[0],)
        return () if x.dim() == 2 else (x.shape[1 - self._time(x)],)

    def _run(self, x: Tensor, start: State | None, sizes: list[int] | None) -> tuple[Tensor, State]:
        """All layers over a sequence, or over a packed one with these batch sizes."""
        batch, endings = self._batch(x, sizes), self._endings()
        directions = 2 if self.bidirectional else 1
        finals: list[State] = []
        for layer in range(self.num_layers):
            quantizer: Any = self._modules[f"input_quantizer{f'_l{layer}' if layer else ''}"]
            x = quantizer(x, saves_input=True)
            outputs = []
            for number in range(layer * directions, (layer + 1) * directions):
                if start is not None:
                    state = tuple(part[number] for part in start)
                else:
                    state = tuple(x.new_zeros(*batch, size) for size in self._state_sizes())
                output, final = self._direction(x, endings[number], state, sizes)
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.training and self.dropout and layer < self.num_layers - 1:
                x = functional.dropout(x, self.dropout)
        return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _direction(
        self, x: Tensor, ending: str, state: State, sizes: list[int] | None
    ) -> tuple[Tensor, State]:
        """One layer in one direction: a matmul for all steps, then step by step."""
        time, reverse = self._time(x), ending.endswith("_reverse")
        projected = functional.linear(
            x, self._weight(f"weight_ih{ending}"), self._bias(f"bias_ih{ending}")
        )
        names = ("hidden", "projection") if self.proj_size else ("hidden",)
        # Every element of the batch at every step has a state.
        rows = x.numel() // x.shape[-1]
        quantize = [
            EveryStep(self._modules[activation_quantizer_name(name, ending)], rows * size)
            for name, size in zip(names, self._state_sizes(), strict=False)
        ]
        cell = self._cell(ending, quantize)
        if sizes is None:
            outputs, final = _scan(cell, projected.unbind(time), state, reverse)
            output = torch.stack(outputs, time)
        else:
            outputs, final = _scan_packed(cell, torch.split(projected, sizes), state, reverse)
            output = torch.cat(outputs)
        for quantizer in quantize:
            quantizer.observe()
        return output, final

    def _weight(self, name: str) -> Tensor:
        """A quantized weight."""
        quantizer: Any = self._modules[weight_quantizer_name(name)]
        weight: Tensor = quantizer(getattr(self, name))
        return weight

    def _bias(self, name: str) -> Tensor | None:
        bias: Tensor | None = getattr(self, name) if self.bias else None
        return bias


class EveryStep:
    """One quantizer in one forward: its scale is computed once, and all steps are observed as one.

    Args:
        quantizer: That of a hidden state, or of the input of a projection.
        values: The number of values that it quantizes in all steps together.
    """

    def __init__(self, quantizer: Any, values: int) -> None:
        self._quantizer = quantizer
        trains = isinstance(quantizer, ActivationQuantizer)
        self._quantize = quantizer.for_many_calls(values) if trains else quantizer
        self._seen: list[Tensor] | None = [] if trains and quantizer.is_observing else None

    def __call__(self, x: Tensor) -> Tensor:
        """Fake-quantize one step's tensor."""
        if self._seen is not None:
            self._seen.append(x)
        result: Tensor = self._quantize(x)
        return result

    def observe(self) -> None:
        """Let the range follow what was seen, as one batch."""
        if self._seen is not None:
            with torch.no_grad():
                self._quantizer.observe_values(torch.cat(self._seen))


def _scan(
    cell: Cell, steps: Sequence[Tensor], state: State, reverse: bool
) -> tuple[list[Tensor], State]:
    """The hidden state after every step, in the order of time, and the state after the last."""
    outputs = []
    for step in reversed(steps) if reverse else steps:
        state = cell(step, state)
        outputs.append(state[0])
    return outputs[::-1] if reverse else outputs, state


def _scan_packed(
    cell: Cell, steps: Sequence[Tensor], start: State, reverse: bool
) -> tuple[list[Tensor], State]:
    """The same over a packed batch: sequences end as time goes on, and begin in reverse."""
    outputs, ended = [], []
    state = tuple(part[:0] for part in start) if reverse else start
    for step in reversed(steps) if reverse else steps:
        before, now = len(state[0]), len(step)
        if now > before:
            pairs = zip(state, start, strict=True)
            state = tuple(torch.cat((part, first[before:now])) for part, first in pairs)
        elif now < before:
            ended.append(tuple(part[now:] for part in state))
            state = tuple(part[:now] for part in state)
        state = cell(step, state)
        outputs.append(state[0])
    ended.append(state)
    final = tuple(torch.cat(parts[::-1]) for parts in zip(*ended, strict=True))
    return outputs[::-1] if reverse else outputs, final


def _permuted(state: State, order: Tensor | None) -> State:
    """A state ``(layers, batch, size)`` with its batch in another order."""
    return state if order is None else tuple(part.index_select(1, order) for part in state)
