"""Learned scales of weights (LSQ, arXiv:1902.08153)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_qat.function_hooks.running import hide_from_hooks
from lightning_qat.numerics.arithmetic import channels_second, symmetric_scale
from lightning_qat.numerics.calibration.clipping import outgrown
from lightning_qat.numerics.calibration.search import least_squares_scale
from lightning_qat.numerics.gpu.device_grid import DeviceGrid, GridRule
from lightning_qat.numerics.gpu.launch import suits
from lightning_qat.numerics.gpu.learned import learned_fake_quantize as learned_on_device
from lightning_qat.numerics.int_repr import IntRepr
from lightning_qat.numerics.learned_fake_quantize import (
    gradient_factor,
    half_width_of_step,
    learned_fake_quantize,
    step_of_half_width,
)
from lightning_qat.numerics.min_max import channel_ranges
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.numerics.transforms import is_transforming
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.specs import WeightSpec


class LearnedWeightQuantizer(WeightQuantizer):
    """Learns the scales of a weight: LSQ, and AMCT's ULQ, which differs in the grid alone.

    Learning starts in the first training forward from the scales with the least squared error
    (``initial="mse"``) or from the largest absolute weights. A weight outside the range gets no
    gradient. So a channel that has outgrown its range (``outgrown``), as those of random weights
    do, gets the range of its largest weight, once after each step of the optimizer: in the next
    training forward on a CPU, and in ``follow_weights`` on any device, compiled or not. A scale
    that does not require gradients stays.

    The parameter is the scale times half the number of integers, as that of learned activations:
    a step of Adam is as long as the learning rate, and a scale of 8 bits is no longer than that.

    Args:
        spec: With ``quantizer="learned"``, or ``"ulq"`` for AMCT's grid (-128..127 at 8 bits).
        axis: The output channel's axis of the weight.
        channels: The number of output channels.
        groups: See ``WeightQuantizer``.

    Attributes:
        half_width: Parameter, ``(channels,)`` or scalar: its absolute value is ``2 ** (bits - 1)``
            scales; see ``step_of_half_width``.
        started: Whether ``half_width`` has been set from a weight, float32 scalar buffer.
    """

    started: Tensor

    def __init__(self, spec: WeightSpec, axis: int, channels: int, groups: int = 1) -> None:
        super().__init__(spec, axis, groups)
        if spec.quantizer == "ulq":
            self.grid = IntegerGrid.signed(spec.bits)
        shape = () if self._channel_axis is None else (channels,)
        self.half_width = nn.Parameter(torch.ones(shape))
        self.register_buffer("started", torch.tensor(0.0))
        self.ready = False
        self._version = -1

    def forward(self, weight: Tensor) -> Tensor:
        """The fake-quantized weight, same shape and dtype."""
        if weight.is_cpu and self.in_training and not (is_compiling() or is_transforming()):
            with hide_from_hooks():
                widen_outgrown([(self, weight)])
        return super().forward(weight)

    @property
    def left_behind(self) -> bool:
        """Whether its weight may have outgrown the range since the last look.

        An optimizer's step changes the version, and no graph needs the range of before.
        """
        learns = self.ready and self.quantizing and self.half_width.requires_grad
        return learns and self._present_version() != self._version

    def has_looked(self) -> None:
        """Nothing is left behind until the next step."""
        self._version = self._present_version()

    def _present_version(self) -> int:
        return -1 if self.half_width.is_inference() else self.half_width._version

    def ends(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest weight of each channel, ``(channels,)`` or ``(1,)``."""
        low, high = channel_ranges(*self._rows(weight.detach().to(torch.float32)))
        return low.reshape(-1), high.reshape(-1)

    def _fake_quantize(self, weight: Tensor, known: Tensor | IntRepr | None) -> Tensor:
        if not self.ready and self.in_training and not is_transforming():
            self._start(weight)
        if isinstance(known, Tensor):
            known, _ = self._rows(known)
        rows, axis = self._rows(weight)
        if self.ready and suits(rows) and axis in (None, 0):
            share = rows.numel() // self.half_width.numel()
            quantized = learned_on_device(
                rows,
                DeviceGrid(GridRule.HALF_WIDTH, self.half_width, self.half_width, self.grid),
                gradient_factor(share, self.grid, has_low=False),
                saves_input=True,
                carries_int_repr=self.compact and self.groups == 1,
                known=known,
            )
            return quantized if self.groups == 1 else channels_second(quantized, self.groups)
        scale = self.step() if self.ready else self._scale(weight)
        quantized = learned_fake_quantize(
            rows,
            scale,
            None,
            self.grid,
            axis=axis,
            saves_input=True,
            carries_int_repr=self.compact and self.groups == 1,
            known=known,
        )
        return quantized if self.groups == 1 else channels_second(quantized, self.groups)

    @torch.no_grad()
    def _start(self, weight: Tensor) -> None:
        self.start_from_step(self._scale(weight))

    @torch.no_grad()
    def start_from_step(self, scale: Tensor) -> None:
        """Let learning go on from a scale, to the bit."""
        self.half_width.copy_(half_width_of_step(scale, self.grid))
        self.started.fill_(1.0)
        self.ready = True
        self.has_looked()

    def step(self) -> Tensor:
        """The scale, ``(channels,)`` or scalar, with its gradient."""
        return step_of_half_width(self.half_width, self.grid)

    @torch.no_grad()
    def _scale(self, weight: Tensor) -> Tensor:
        if self.ready:
            return self.step()
        scale = super()._scale(weight)
        if self.spec.initial == "minmax":
            return scale
        rows, axis = self._rows(weight)
        return least_squares_scale(rows, scale, self.grid, axis)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Any, prefix: str, *args: Any
    ) -> None:
        stored = state_dict.pop(f"{prefix}scale", None)
        if isinstance(stored, Tensor):
            # Earlier versions learned the scale, one for the same channel of all groups at first.
            if stored.numel() * self.groups == self.half_width.numel():
                stored = stored.repeat(self.groups)
            state_dict[f"{prefix}half_width"] = stored * self.grid.half_count
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.ready = bool(self.started > 0)
        self._version = -1


@torch.no_grad()
def widen_outgrown(learned: Iterable[tuple[LearnedWeightQuantizer, Tensor]]) -> None:
    """Widen the ranges that weights have outgrown to the largest weights, channel by channel.

    See ``outgrown``. The weights are looked at once after an optimizer's step: three operations
    for each, some forty for all of a grid together.

    Args:
        learned: Quantizers and their weights.
    """
    alike: dict[Any, list[tuple[LearnedWeightQuantizer, Tensor]]] = defaultdict(list)
    for quantizer, weight in learned:
        if quantizer.left_behind and weight.numel():
            alike[quantizer.grid, weight.device].append((quantizer, weight))
    for (grid, device), pairs in alike.items():
        ends = [quantizer.ends(weight) for quantizer, weight in pairs]
        low, high = (torch.cat(of) for of in zip(*ends, strict=True))
        widths = [quantizer.half_width.view(-1) for quantizer, _ in pairs]
        width, largest = torch.cat(widths), torch.maximum(-low, high)
        reach = (grid.qmax + 1) / grid.half_count
        # Elsewhere than on a CPU the answer would have to be waited for.
        if device.type != "cpu" or bool((largest > width.abs() * reach).any()):
            shares = [weight.numel() / quantizer.half_width.numel() for quantizer, weight in pairs]
            values = torch.cat([torch.full_like(*of) for of in zip(widths, shares, strict=True)])
            is_outgrown = outgrown(low, high, step_of_half_width(width, grid), values, grid)
            # -128 of AMCT's grid would saturate where a batch norm with a negative factor is
            # folded.
            widest = symmetric_scale(largest, grid.symmetric)
            found = torch.where(is_outgrown, half_width_of_step(widest, grid), width)
            parts = torch.split(found, [len(of) for of in widths])
            torch._foreach_copy_(widths, parts)  # pyright: ignore[reportPrivateImportUsage]
        for quantizer, _ in pairs:
            quantizer.has_looked()
