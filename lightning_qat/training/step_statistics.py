"""What one training step shows of its quantizers: ranges, what is clipped, the noise of weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_qat.function_hooks.running import (
    current_forward_cache,
    hide_from_all_modes,
    hide_from_hooks,
)
from lightning_qat.layers.quantized_weights import QuantizedWeight, quantized_weights
from lightning_qat.model.torch_compile import is_compiled, plain_path
from lightning_qat.quantizers.activation import ActivationQuantizer, ParameterQuantizer
from lightning_qat.quantizers.names import place
from lightning_qat.training.range_sync import activation_quantizers

SAMPLES = 2**12
"""Of so many values of a tensor, evenly spread, it is counted how many are clipped."""


class Statistics(NamedTuple):
    """The statistics of one step.

    Args:
        numbers: By name: ``range_min/<tensor>`` and ``range_max/<tensor>`` (real ends of the grid),
            ``clipped/<tensor>`` (share of the values outside it), ``weight_scale/<weight>`` (mean
            over channels) and ``weight_sqnr_db/<weight>``.
        values: Samples of activations before quantization and of weights, by their names.
    """

    numbers: Mapping[str, float]
    values: Mapping[str, Tensor]


class StepStatistics:
    """Looks at the quantizers of a model during one step.

    A tensor that a relu has quantized already, in one pass, is computed anew for the sample. Of a
    model that ``torch.compile`` compiles in part ranges and weights alone are read, for hooks would
    make it compile anew.

    Args:
        model: A prepared model; until ``finish`` its quantizers carry hooks.
        weights: Look at the weights as well, which quantizes each once more.
        observed: Sample tensors that are only observed as well.
    """

    def __init__(self, model: nn.Module, *, weights: bool = True, observed: bool = False) -> None:
        self._model, self._weights, self._observed = model, weights, observed
        self._clipped: dict[str, list[Tensor]] = defaultdict(list)
        self._samples: dict[str, Tensor] = {}
        self._quantizers = {
            place(plain_path(name)): quantizer
            for name, quantizer in activation_quantizers(model).items()
            if not isinstance(quantizer, ParameterQuantizer)
        }
        self._handles: list[Any] = []
        if not is_compiled(model):
            self._handles = [
                quantizer.register_forward_pre_hook(partial(self._look, name))
                for name, quantizer in self._quantizers.items()
            ]

    def finish(self) -> Statistics:
        """Take the hooks off, and read everything; waits for the device once."""
        self.cancel()
        with torch.no_grad(), hide_from_hooks():
            weights = [
                one
                for one in (quantized_weights(self._model) if self._weights else ())
                if one.quantizer.quantizing
            ]
            tensors = dict(self._numbers(weights))
        if not tensors:
            return Statistics({}, {})
        device = next(iter(tensors.values())).device
        stacked = torch.stack([tensor.to(device, torch.float32) for tensor in tensors.values()])
        # No logger takes an infinite ratio.
        numbers = {
            name: value
            for name, value in zip(tensors, stacked.tolist(), strict=True)
            if math.isfinite(value)
        }
        samples = {one.key: _spread(one.weight) for one in weights}
        return Statistics(numbers, {**self._samples, **samples})

    def cancel(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _look(self, name: str, quantizer: Any, args: tuple[Any, ...]) -> None:
        x = args[0]
        quantized = quantizer.calibrated and quantizer.quantizing
        if is_compiling() or not x.numel() or not (quantized or self._observed):
            return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        cache = current_forward_cache()
        # The first batch may make the plan: what is counted here is no join of the model's.
        with torch.no_grad(), hide_from_all_modes():
            values = _spread(x) if cache is None else cache.relu_fusion.peek(x, _spread)
            self._samples[name] = values
            if quantized:
                low, high, scale = _ends(quantizer)
                outside = (values < low - scale / 2) | (values > high + scale / 2)
                self._clipped[name].append(outside.float().mean())

    def _numbers(self, weights: Sequence[QuantizedWeight]) -> Iterator[tuple[str, Tensor]]:
        for name, quantizer in self._quantizers.items():
            if quantizer.calibrated:
                low, high, _ = _ends(quantizer)
                yield f"range_min/{name}", low
                yield f"range_max/{name}", high
        for name, shares in self._clipped.items():
            yield f"clipped/{name}", torch.stack(shares).mean()
        for one in weights:
            scale = one.quantizer.qparams(one.weight).scale.mean()
            yield f"weight_scale/{one.key}", scale.to(one.weight.device)
            yield f"weight_sqnr_db/{one.key}", _sqnr(one.weight, one.quantizer(one.weight))


def _spread(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(flat.numel() // SAMPLES, 1)].float()


def _ends(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest and the largest real value on the grid, and its step."""
    scale, zero_point = quantizer.scale_and_zero_point()
    grid = quantizer.grid
    return (grid.qmin - zero_point) * scale, (grid.qmax - zero_point) * scale, scale


def _sqnr(real: Tensor, quantized: Tensor) -> Tensor:
    """In decibels; infinite where nothing differs."""
    noise = (real.float() - quantized.float()).square().sum()
    return 10 * torch.log10(real.float().square().sum() / noise)
