"""Recurrent layers: one range and one rounding of the weights for all time steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_qat.layers._recurrent import Cell, EveryStep, RecurrentQAT, State
from lightning_qat.recipe.recipe import Recipe


class LSTMQAT(RecurrentQAT, nn.LSTM):
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

    def _cell(self, ending: str, quantize: Sequence[EveryStep]) -> Cell:
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


class GRUQAT(RecurrentQAT, nn.GRU):
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

    def _cell(self, ending: str, quantize: Sequence[EveryStep]) -> Cell:
        weight, bias = self._weight(f"weight_hh{ending}"), self._bias(f"bias_hh{ending}")

        def step(x: Tensor, state: State) -> State:
            (h,) = state
            from_x = x.chunk(3, -1)
            from_h = functional.linear(quantize[0](h), weight, bias).chunk(3, -1)
            r, z = ((a + b).sigmoid() for a, b in zip(from_x[:2], from_h[:2], strict=True))
            n = (from_x[2] + r * from_h[2]).tanh()
            return (n + z * (h - n),)

        return step
