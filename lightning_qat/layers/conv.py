"""Convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from lightning_qat.layers._layer import QATLayer
from lightning_qat.recipe import Recipe


class Conv2dQAT(nn.Conv2d, QATLayer):
    """``nn.Conv2d`` with fake-quantized input and weight.

    Input ``(batch, in_channels, height, width)``, weight scales per output channel (axis 0) or per
    tensor. Arguments are those of ``nn.Conv2d``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Step of the kernel.
        padding: Zeros around the input: real zero is always on the grid, so padding is exact.
        dilation: Spacing of the kernel's elements.
        groups: Blocks of channels convolved apart; ``in_channels`` for a depthwise convolution.
        bias: Whether a bias is added, in float until export.
        padding_mode: Only ``zeros``.
        device: Where the parameters live.
        dtype: Only ``torch.float32``.
        config: A recipe, the name of a preset, a recipe file or a mapping; ``int8`` by default.

    Raises:
        ValueError: ``padding_mode`` is not ``zeros``.

    Example:
        >>> conv = Conv2dQAT(3, 8, kernel_size=3, padding=1)
        >>> conv(torch.zeros(1, 3, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    float_class = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: Recipe | Mapping[str, Any] | str | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        reason = self.why_unsupported(self)
        if reason is not None:
            raise ValueError(f"Conv2dQAT: {reason}.")
        self._add_quantizers(self._spec(config))

    @classmethod
    def why_unsupported(cls, module: nn.Module) -> str | None:
        """Other padding modes pad with values that no target's integer convolution can make."""
        mode = getattr(module, "padding_mode", "zeros")
        return None if mode == "zeros" else f"padding_mode must be 'zeros'; got {mode!r}"

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the fake-quantized input with the fake-quantized weight."""
        weight: Tensor = self.weight_quantizer(self.weight)
        output: Tensor = self._conv_forward(self.input_quantizer(input), weight, self.bias)
        return output
