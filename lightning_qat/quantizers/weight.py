"""Fake quantization of weights by their own minimum and maximum."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_qat.function_hooks.running import hide_from_hooks
from lightning_qat.numerics.arithmetic import (
    along_channels,
    arq_scale,
    channels_first,
    channels_second,
    symmetric_scale,
)
from lightning_qat.numerics.fake_quantize import fake_quantize, quantized_again
from lightning_qat.numerics.gpu.weights import Channels
from lightning_qat.numerics.int_repr import IntRepr
from lightning_qat.numerics.min_max import channel_ranges
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat.numerics.transforms import is_transforming
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.torch_onnx_export import is_exporting_onnx, quantize_dequantize
from lightning_qat.quantizers.weight_cache import QuantizedWeightCache, WeightGroup, tensor_state
from lightning_qat.recipe.specs import WeightSpec


class WeightQuantizer(Quantizer):
    r"""Fake-quantizes a weight with a symmetric grid whose scale follows the weight itself.

    .. math:: \hat w = s \cdot \mathrm{clip}(\mathrm{round}(w / s), q_{min}, q_{max})

    with :math:`s = \max|w| / ((q_{max} - q_{min}) / 2)` per channel or per tensor at every forward
    (AMCT's rule with ``quantizer="arq"``). The float weight is never overwritten. The gradient is
    straight-through everywhere: the range follows the weight, so nothing lies outside for long.

    Args:
        spec: Bits, granularity and rule of the scale.
        axis: The output channel's axis of the weight.
        groups: Of a transposed convolution, whose weight has ``out / groups`` channels on the axis.

    Attributes:
        quantizing: Fake quantization is on; otherwise the weight passes through unchanged.
        compact: Backward keeps integers, which takes less memory; see ``int_repr``.
        cache: Keeps quantized weights for further forwards; ``None``: nothing is kept.
        group: Quantizes the weights of a model together; ``None``: this one is quantized alone.
        shared: Several layers share the weight, and this quantizer.
    """

    SWITCHES = Quantizer.SWITCHES | {"quantizing", "compact", "cache", "group"}

    def __init__(self, spec: WeightSpec, axis: int, groups: int = 1) -> None:
        super().__init__()
        self.cache: QuantizedWeightCache | None = None
        self.group: WeightGroup | None = None
        self.spec: WeightSpec = spec
        self.axis = axis
        self.groups = groups if spec.granularity == "per_channel" else 1
        self.quantizing = True
        self.shared = False
        self.compact = False
        arq = spec.quantizer == "arq"
        self.grid = IntegerGrid.signed(spec.bits) if arq else IntegerGrid.weight(spec.bits)

    @property
    def idle(self) -> bool:
        """Whether it returns its input now."""
        return not self.quantizing

    @property
    def identity(self) -> object:
        """Itself; see ``InputQuantizer``."""
        return self

    def forward(self, weight: Tensor) -> Tensor:
        """The fake-quantized weight, same shape and dtype."""
        if not self.quantizing:
            return weight
        if is_exporting_onnx():
            return self._exported(weight)
        with hide_from_hooks():
            if self.cache is None or is_compiling() or is_transforming() or not _lasts(weight):
                return self._fake_quantize(weight, None)
            state = self.compact, tensor_state(weight, *self.parameters())
            known = self.cache.get(self, state)
            quantized = self._fake_quantize(weight, known)
            if known is None:
                self.cache.put(self, state, quantized)
            return quantized

    def _fake_quantize(self, weight: Tensor, known: Tensor | IntRepr | None) -> Tensor:
        """Quantize the weight; ``known``: how that came out in an earlier forward."""
        if known is None and self.group is not None:
            together = self.group.quantized(self, weight)
            if together is not None:
                return quantized_again(weight, together.values, together.int_repr)
        if known is not None:
            return quantized_again(weight, known)
        scale = along_channels(self._scale(weight), weight.shape, self._channel_axis)
        zero_point = scale.new_zeros(())
        return fake_quantize(
            weight,
            scale,
            zero_point,
            self.grid,
            gradient_everywhere=True,
            carries_int_repr=self.compact,
        )

    def _exported(self, weight: Tensor) -> Tensor:
        with hide_from_hooks():
            scale = self._scale(weight)
            zero_point = torch.zeros_like(scale)
            if self.groups == 1:
                return quantize_dequantize(weight, scale, zero_point, self.grid, self._channel_axis)
            # ONNX has scales along one axis.
            rows = channels_first(weight, self.groups)
            rows = quantize_dequantize(rows, scale, zero_point, self.grid, 0)
            return channels_second(rows, self.groups)

    def qparams(self, weight: Tensor) -> QParams:
        """The final numbers for a weight, on the CPU."""
        scale = self._scale(weight).cpu()
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        return QParams(scale, zero_point, self.grid, self._channel_axis)

    def has_finite_scale(self, weight: Tensor) -> bool:
        """Whether there are numbers to be made final; waits for the device."""
        return bool(torch.isfinite(self._scale(weight)).all())

    @property
    def channels(self) -> Channels:
        """Which values of the weight share a scale."""
        return Channels(self._channel_axis, self.groups)

    @property
    def _channel_axis(self) -> int | None:
        return self.axis if self.spec.granularity == "per_channel" else None

    def _rows(self, weight: Tensor) -> tuple[Tensor, int | None]:
        """The weight with every output channel along one axis, and that axis."""
        if self.groups == 1:
            return weight, self._channel_axis
        return channels_first(weight, self.groups), 0

    @torch.no_grad()
    def _scale(self, weight: Tensor) -> Tensor:
        low, high = channel_ranges(*self._rows(weight.to(torch.float32)))
        if self.spec.quantizer == "arq":
            return arq_scale(low, high, self.grid)
        return symmetric_scale(torch.maximum(low.abs(), high.abs()), self.grid)

    def extra_repr(self) -> str:
        """Bits and granularity, for ``print(model)``."""
        return f"{self.spec.bits} bits, {self.spec.granularity}, {self.spec.quantizer}"


def _lasts(weight: Tensor) -> bool:
    """Whether a weight is a parameter, or rows of one: others are computed in every forward."""
    return isinstance(weight if weight._base is None else weight._base, nn.Parameter)
