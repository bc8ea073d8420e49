"""Transposed convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_qat.layers._layer import QATLayer
from lightning_qat.layers.conv import Size
from lightning_qat.model.module_input import as_module_input
from lightning_qat.numerics.int_repr import saving_int_repr
from lightning_qat.recipe.recipe import Recipe

_FUNCTIONS: Mapping[int, Any] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


class _ConvTransposeQAT(QATLayer):
    """Constructor and forward of transposed convolutions of all dimensions.

    A weight is ``(in_channels, out_channels / groups, ...)``: the output channels of a group are on
    axis 1 of its rows. There is a scale for each of the ``out_channels``, group by group.
    """

    channel_axis = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
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
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self._add_quantizers(self._spec(config))

    def channel_groups(self) -> int:
        """The layer's groups."""
        groups: Any = self.groups
        return int(groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve the fake-quantized input, transposed, with the fake-quantized weight.

        Args:
            input: ``(batch, in_channels, ...)``.
            output_size: The size of the output, where stride leaves a choice; ``output_padding``
                decides otherwise.
        """
        layer: Any = self
        padding = layer._output_padding(
            input,
            output_size,
            layer.stride,
            layer.padding,
            layer.kernel_size,
            len(layer.kernel_size),
            layer.dilation,
        )
        x: Tensor = self.input_quantizer(input, saves_input=True)
        weight: Tensor = self.weight_quantizer(as_module_input(self.weight))
        with saving_int_repr(x, weight):
            output: Tensor = _FUNCTIONS[len(layer.kernel_size)](
                x,
                weight,
                self.bias,
                layer.stride,
                layer.padding,
                padding,
                layer.groups,
                layer.dilation,
            )
        return output


class ConvTranspose1dQAT(_ConvTransposeQAT, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with fake-quantized input and weight; see ``ConvTranspose2dQAT``.

    Example:
        >>> ConvTranspose1dQAT(2, 3, 2, stride=2)(torch.zeros(1, 2, 4)).shape
        torch.Size([1, 3, 8])
    """

    float_class = nn.ConvTranspose1d


class ConvTranspose2dQAT(_ConvTransposeQAT, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with fake-quantized input and weight.

    Input ``(batch, in_channels, height, width)``, a weight scale per output channel or one per
    tensor. Arguments are those of ``nn.ConvTranspose2d``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Step of the kernel on the output.
        padding: What is cut off around the output.
        output_padding: Further rows and columns at one end of the output.
        groups: Blocks of channels convolved apart.
        bias: Whether a bias is added, in float until export.
        dilation: Spacing of the kernel's elements.
        padding_mode: Only ``zeros``; torch refuses others.
        device: Where the parameters live.
        dtype: Only ``torch.float32``.
        config: A recipe, the name of a preset, a recipe file or a mapping, also AMCT's with
            ``retrain_data_config`` and ``retrain_weight_config``; ``int8`` by default.

    Example:
        >>> up = ConvTranspose2dQAT(2, 3, kernel_size=3, stride=2, padding=1, output_padding=1)
        >>> up(torch.zeros(1, 2, 4, 4)).shape
        torch.Size([1, 3, 8, 8])
    """

    float_class = nn.ConvTranspose2d


class ConvTranspose3dQAT(_ConvTransposeQAT, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with fake-quantized input and weight; see ``ConvTranspose2dQAT``.

    Example:
        >>> ConvTranspose3dQAT(1, 2, 2, stride=2)(torch.zeros(1, 1, 2, 2, 2)).shape
        torch.Size([1, 2, 4, 4, 4])
    """

    float_class = nn.ConvTranspose3d
