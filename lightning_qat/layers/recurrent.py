"""Recurrent layers: one range and one rounding of the weights for all time steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from lightning_qat.layers._layer import QATLayer, weight_quantizer_name
from lightning_qat.observers import batch_range
from lightning_qat.quantizers import ActivationQuantizer
from lightning_qat.recipe import Recipe
from lightning_qat.tape import hidden

State = tuple[Tensor, ...]
"""What one step hands to the next: ``(h, c)`` of an LSTM, ``(h,)`` of a GRU."""

Cell = Callable[[Tensor, State], State]
"""One step: the projected input and the state before it, to the state after it."""


class _RecurrentQAT(QATLayer, nn.RNNBase):
    """What LSTM and GRU share: everything but the cell.

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
        inputs = [f"input_quantizer_l{layer}" for layer in range(1, self.num_layers)]
        states = [f"hidden_quantizer{ending}" for ending in self._endings()]
        projected = [f"projection_quantizer{e}" for e in self._endings() if self.proj_size]
        return ("input_quantizer", *inputs, *states, *projected)

    def _endings(self) -> list[str]:
        """``_l0``, ``_l0_reverse``, ``_l1`` and so on: how torch's parameter names end."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{d}" for layer in range(self.num_layers) for d in directions]

    @abstractmethod
    def _state_sizes(self) -> tuple[int, ...]:
        """Features of each tensor of the state."""

    @abstractmethod
    def _cell(self, ending: str, quantize: Sequence[_EveryStep]) -> Cell:
        """One layer's and direction's step; its weights are quantized here, once.

        Args:
            ending: Of its parameters' names.
            quantize: What quantizes its hidden state and, where it has one, its projection's input.
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
        # Its arithmetic is no join of the model's.
        with hidden():
            if not isinstance(input, PackedSequence):
                output, final = self._run(input, self._checked(input, hx, None), None)
                return output, self._formed(final)
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
        return state if len(state) > 1 else state[0]

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
            x = self._modules[f"input_quantizer{f'_l{layer}' if layer else ''}"](x)  # type: ignore[misc]
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
        quantize = [_EveryStep(self._modules[f"{name}_quantizer{ending}"]) for name in names]
        cell = self._cell(ending, quantize)
        if sizes is None:
            outputs, final = _scan(cell, projected.unbind(time), state, reverse)
            output = torch.stack(outputs, time)
        else:
            outputs, final = _scan_packed(cell, projected.split(sizes), state, reverse)
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


class LSTMQAT(_RecurrentQAT, nn.LSTM):
    r"""``nn.LSTM`` with fake-quantized inputs, hidden states and weights.

    With :math:`\hat\cdot` for what is quantized, at every step

    .. math::
        (i, f, g, o) &= \hat W \hat x_t + b + \hat R \hat h_{t-1} + d \\
        c_t &= \sigma(f) c_{t-1} + \sigma(i) \tanh(g) \\
        h_t &= \sigma(o) \tanh(c_t)

    Gates and cell state are float, as in Huawei AMCT and CANN. A layer's input has one range for
    all steps, and so has each direction's hidden state; weights are rounded once per forward, per
    row of the ``4 * hidden_size`` or per tensor. The range of a hidden state is that of the steps
    before, so in the very first training batch it is not quantized yet.

    With ``proj_size`` the projection's weight and what it multiplies are quantized as well.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the hidden state.
        num_layers: Layers; each reads the hidden states of the one before.
        bias: Whether biases are added, in float until export.
        batch_first: Input and output are ``(batch, time, features)``.
        dropout: Probability, on the output of each layer but the last; in training only.
        bidirectional: A second set of weights reads the sequence from its end.
        proj_size: Features that the hidden state is projected to; 0: it is not.
        device: Where the parameters live.
        dtype: Only ``torch.float32``.
        config: A recipe, the name of a preset, a recipe file or a mapping; ``int8`` by default.

    Example:
        >>> lstm = LSTMQAT(3, 4, num_layers=2, batch_first=True)
        >>> output, (h, c) = lstm(torch.zeros(2, 5, 3))
        >>> output.shape, h.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 2, 4]))
    """

    float_class = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: Recipe | Mapping[str, Any] | str | None = None,
    ) -> None:
        """Arguments are those of ``nn.LSTM``, and ``config``."""
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self._add_quantizers(self._spec(config))

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    def _cell(self, ending: str, quantize: Sequence[_EveryStep]) -> Cell:
        weight, bias = self._weight(f"weight_hh{ending}"), self._bias(f"bias_hh{ending}")
        projection = self._weight(f"weight_hr{ending}") if self.proj_size else None

        def step(x: Tensor, state: State) -> State:
            h, c = state
            gates = x + functional.linear(quantize[0](h), weight, bias)
            i, f, g, o = gates.chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            if projection is not None:
                h = functional.linear(quantize[1](h), projection)
            return h, c

        return step


class GRUQAT(_RecurrentQAT, nn.GRU):
    r"""``nn.GRU`` with fake-quantized inputs, hidden states and weights.

    With :math:`\hat\cdot` for what is quantized, at every step

    .. math::
        (r_x, z_x, n_x) &= \hat W \hat x_t + b, \quad
        (r_h, z_h, n_h) = \hat R \hat h_{t-1} + d \\
        n &= \tanh(n_x + \sigma(r_x + r_h) n_h) \\
        h_t &= n + \sigma(z_x + z_h) (h_{t-1} - n)

    which is torch's, cuDNN's and CANN's form (ONNX: ``linear_before_reset=1``). Ranges, weights,
    arguments and errors as ``LSTMQAT``; a GRU has no ``proj_size``.

    Example:
        >>> output, h = GRUQAT(3, 4, bidirectional=True)(torch.zeros(5, 2, 3))
        >>> output.shape, h.shape
        (torch.Size([5, 2, 8]), torch.Size([2, 2, 4]))
    """

    float_class = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: Recipe | Mapping[str, Any] | str | None = None,
    ) -> None:
        """Arguments are those of ``nn.GRU``, and ``config``."""
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self._add_quantizers(self._spec(config))

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _cell(self, ending: str, quantize: Sequence[_EveryStep]) -> Cell:
        weight, bias = self._weight(f"weight_hh{ending}"), self._bias(f"bias_hh{ending}")

        def step(x: Tensor, state: State) -> State:
            (h,) = state
            from_x = x.chunk(3, -1)
            from_h = functional.linear(quantize[0](h), weight, bias).chunk(3, -1)
            r, z = ((a + b).sigmoid() for a, b in zip(from_x[:2], from_h[:2], strict=True))
            n = (from_x[2] + r * from_h[2]).tanh()
            return (n + z * (h - n),)

        return step


class _EveryStep:
    """One quantizer in one forward: its numbers once, and one observation of all steps."""

    def __init__(self, quantizer: Any) -> None:
        self._quantizer = quantizer
        trains = isinstance(quantizer, ActivationQuantizer)
        self._quantize = quantizer.for_many_calls() if trains else quantizer
        observes = trains and quantizer.observing and quantizer.training
        self._seen: list[Tensor] | None = [] if observes else None

    def __call__(self, x: Tensor) -> Tensor:
        """Fake-quantize one step's tensor."""
        if self._seen is not None:
            self._seen.append(x.detach().flatten())
        result: Tensor = self._quantize(x)
        return result

    def observe(self) -> None:
        """Let the range follow what was seen, as one batch."""
        seen = torch.cat(self._seen) if self._seen else torch.empty(0)
        if seen.numel():
            self._quantizer.observe(batch_range(seen))


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
