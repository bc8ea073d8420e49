"""Convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.layers._layer import QATLayer
from lightning_qat.model.module_input import as_module_input
from lightning_qat.numerics.int_repr import saving_int_repr
from lightning_qat.recipe.recipe import Recipe

Size = int | tuple[int, ...]


class _ConvQAT(QATLayer):
    """Constructor and forward of convolutions of all dimensions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: Recipe | Mapping[str, Any] | str | None = None,
    ) -> None:
        """Arguments are those of the float layer, and ``config``."""
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        reason = self.why_unsupported(self)
        if reason is not None:
            raise ValueError(f"{type(self).__name__}: {reason}.")
        self._add_quantizers(self._spec(config))

    @classmethod
    def why_unsupported(cls, module: nn.Module) -> str | None:
        """Other padding modes pad with values that no target's integer convolution can make."""
        mode = getattr(module, "padding_mode", "zeros")
        return None if mode == "zeros" else f"padding_mode must be 'zeros'; got {mode!r}"

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the fake-quantized input with the fake-quantized weight."""
        convolution: Any = self
        if type(convolution)._conv_forward is not convolution.float_class._conv_forward:
            # A user's, which makes a weight of its own: the plan quantizes what it convolves.
            return convolution._conv_forward(input, self.weight, self.bias)  # type: ignore[no-any-return]
        x: Tensor = self.input_quantizer(input, saves_input=True)
        weight: Tensor = self.weight_quantizer(as_module_input(self.weight))
        with saving_int_repr(x, weight):
            output: Tensor = convolution._conv_forward(x, weight, self.bias)
        return output


class Conv1dQAT(_ConvQAT, nn.Conv1d):
    """``nn.Conv1d`` with fake-quantized input and weight.

    Input ``(batch, in_channels, length)``; weight scales, arguments and errors as ``Conv2dQAT``.

    Example:
        >>> Conv1dQAT(3, 8, kernel_size=3)(torch.zeros(1, 3, 6)).shape
        torch.Size([1, 8, 4])
    """

    float_class = nn.Conv1d


class Conv2dQAT(_ConvQAT, nn.Conv2d):
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
        config: A recipe, the name of a preset, a recipe file or a mapping, also AMCT's with
            ``retrain_data_config`` and ``retrain_weight_config``; ``int8`` by default.

    Raises:
        ValueError: ``padding_mode`` is not ``zeros``.

    Example:
        >>> conv = Conv2dQAT(3, 8, kernel_size=3, padding=1)
        >>> conv(torch.zeros(1, 3, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    float_class = nn.Conv2d


class Conv3dQAT(_ConvQAT, nn.Conv3d):
    """``nn.Conv3d`` with fake-quantized input and weight.

    Input ``(batch, in_channels, depth, height, width)``; weight scales, arguments and errors as
    ``Conv2dQAT``.

    Example:
        >>> Conv3dQAT(1, 2, kernel_size=2)(torch.zeros(1, 1, 3, 3, 3)).shape
        torch.Size([1, 2, 2, 2, 2])
    """

    float_class = nn.Conv3d
