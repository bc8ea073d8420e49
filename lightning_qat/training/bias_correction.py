"""Take the mean error of quantization out of a model: into biases and batch norms.

Rounding a weight or clipping an activation shifts the mean of an output channel, and the shift of
one layer is the input of the next. Where the channel has a bias, the bias can take the shift back;
where a batch norm follows, its running statistics can. It matters where nothing is trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from lightning_qat.function_hooks.running import hide_from_hooks
from lightning_qat.layers import QATLayer
from lightning_qat.quantizers.switches import switch

LARGEST_RATIO = 4.0
"""A variance changes so many times at most: what changes more has too few levels left to be one."""


class Moments(NamedTuple):
    """Of one call of a layer, by channel, float64 ``(channels,)``."""

    mean: Tensor
    variance: Tensor


class BiasCorrection:
    r"""Compares every layer's output with the float model's, and takes the shift out.

    A batch runs twice: in float, and quantized. In the quantized run each layer's output is
    corrected before the next layer reads it, so that a layer answers for its own error alone:

    - a layer with a bias :math:`b`, by output channel (empirical bias correction,
      arXiv:1906.04721, section 4.2):
      :math:`b \leftarrow b + E[y_{float}] - E[y_{quantized}]`;
    - a batch norm with input :math:`x`: its running mean takes
      :math:`E[x_{quantized}] - E[x_{float}]`, its running variance the factor
      :math:`Var[x_{quantized}] / Var[x_{float}]`, at most `LARGEST_RATIO`. What was estimated over
      the whole training stays; only the change is measured on these batches.

    Corrections are the mean over the batches. Layers without either are left alone, and so are the
    gates of recurrent layers and attention's projections.

    Args:
        model: A prepared model, in eval mode while batches run; every range is known.

    Example:
        >>> from lightning_qat import prepare, calibrate_unseen
        >>> layer = nn.Linear(1, 1)
        >>> _ = layer.weight.data.fill_(1.0), layer.bias.data.zero_()
        >>> model = nn.Sequential(layer).eval()
        >>> x = torch.tensor([[0.0], [0.4], [0.4], [3.0]])
        >>> _ = prepare(model, {"activation": {"bits": 2}}), calibrate_unseen(model, x)
        >>> correction = BiasCorrection(model)
        >>> with correction:
        ...     correction.run(lambda: model(x))
        >>> correction.apply()  # 0.4 became 0: the mean fell from 0.95 to 0.75
        1
        >>> round(model[0].bias.item(), 2)
        0.2
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and _has_stats(m)]
        self._layers = [m for m in model.modules() if _channel_axis(m) is not None]
        self._float: dict[tuple[nn.Module, int], Moments] = {}
        self._calls: Counter[nn.Module] = Counter()
        self._in_float = False
        self._counts: Counter[nn.Module] = Counter()
        self._found: dict[nn.Module, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> BiasCorrection:
        """Look at every layer's output from here on."""
        self._handles = [
            *(norm.register_forward_hook(self._after_norm) for norm in self._norms),
            *(layer.register_forward_hook(self._after_layer) for layer in self._layers),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._float.clear()

    @torch.no_grad()
    def run(self, forward: Callable[[], Any]) -> None:
        """Run one batch in float and quantized; the model quantizes afterwards.

        Args:
            forward: Runs the model on the batch. Both times it must do the same.
        """
        for in_float in (True, False):
            self._calls.clear()
            self._in_float = in_float
            switch(self._model, quantizing=not in_float, observing=False)
            forward()
        self._float.clear()

    @torch.no_grad()
    def apply(self) -> int:
        """Change the biases and the batch norms; in a process group alike on all processes.

        Returns:
            The number of layers and batch norms that were changed.
        """
        changed = 0
        for module, (count, shift, ratio) in self._totals():
            if not count:
                continue
            changed += 1
            if isinstance(module, _BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.sub_(shift / count)
                module.running_var.mul_(ratio / count)
            else:
                assert isinstance(module.bias, Tensor)
                module.bias.add_(shift / count)
        self._found.clear()
        self._counts.clear()
        return changed

    def _totals(self) -> list[tuple[nn.Module, tuple[float, Tensor, Tensor]]]:
        """Of every module the number of calls and the sums of shifts and ratios, of all processes.

        A module may be called on one process alone, so all of them take part in the exchange.
        """
        modules = [*self._norms, *self._layers]
        if not modules:
            return []
        rows = []
        for module in modules:
            channels = module.bias if isinstance(module, QATLayer) else module.running_mean
            assert isinstance(channels, Tensor)
            nothing = torch.zeros_like(channels, dtype=torch.float64)
            count = nothing.new_tensor([self._counts[module]])
            rows.append(torch.cat([count, *self._found.get(module, [nothing, nothing])]))
        flat = torch.cat(rows)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        totals, start = [], 0
        for module, row in zip(modules, rows, strict=True):
            shift, ratio = flat[start + 1 : start + len(row)].chunk(2)
            totals.append((module, (float(flat[start]), shift, ratio)))
            start += len(row)
        return totals

    def _after_layer(self, layer: nn.Module, args: Any, output: Any) -> Tensor | None:
        axis = _channel_axis(layer)
        if not isinstance(output, Tensor) or axis is None or not output.numel():
            return None
        with hide_from_hooks():
            now = _moments(output, axis % output.dim())
            before = self._paired(layer, now)
            if before is None:
                return None
            shift = before.mean - now.mean
            self._add(layer, shift, torch.ones_like(shift))
            return output + _along(shift.to(output.dtype), axis % output.dim(), output.dim())

    def _after_norm(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        assert isinstance(norm, _BatchNorm)
        with hide_from_hooks():
            x = args[0]
            now = _moments(x, 1)
            before = self._paired(norm, now)
            if before is None:
                return None
            shift = before.mean - now.mean
            ratio = torch.where(before.variance > 0, now.variance / before.variance, 1.0)
            ratio = ratio.nan_to_num(nan=1.0).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
            self._add(norm, shift, ratio)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, variance = norm.running_mean - shift, norm.running_var * ratio
            statistics = (mean.to(norm.running_mean.dtype), variance.to(norm.running_var.dtype))
            return F.batch_norm(x, *statistics, norm.weight, norm.bias, eps=norm.eps)

    def _add(self, module: nn.Module, shift: Tensor, ratio: Tensor) -> None:
        self._counts[module] += 1
        before = self._found.get(module)
        now = [shift, ratio]
        self._found[module] = (
            now if before is None else [a + b for a, b in zip(before, now, strict=True)]
        )

    def _paired(self, module: nn.Module, moments: Moments) -> Moments | None:
        """In the float run keep a call's moments; in the quantized one return those of the call."""
        call = module, self._calls[module]
        self._calls[module] += 1
        if self._in_float:
            self._float[call] = moments
            return None
        return self._float.get(call)


def _has_stats(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and norm.running_var is not None


def _channel_axis(layer: nn.Module) -> int | None:
    """The axis of a layer's output that its bias is along; ``None``: it has no bias to correct."""
    if not isinstance(layer, QATLayer) or not isinstance(getattr(layer, "bias", None), Tensor):
        return None
    if isinstance(layer, nn.Linear):
        return -1
    if isinstance(layer, _ConvNd):
        return -1 - len(layer.kernel_size)
    return None


def _moments(x: Tensor, axis: int) -> Moments:
    """Mean and variance over all other axes."""
    others = [i for i in range(x.dim()) if i != axis]
    wide = x.detach().double()
    if not others:  # one sample without a batch
        return Moments(wide, torch.zeros_like(wide))
    return Moments(wide.mean(others), wide.var(others, correction=0))


def _along(values: Tensor, axis: int, dimensions: int) -> Tensor:
    shape = [1] * dimensions
    shape[axis] = -1
    return values.reshape(shape)
