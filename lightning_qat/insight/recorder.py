"""Run a prepared model with recorders in the place of its quantizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qat.convert.finalize import detached_copy, replace_quantizers, tensor_keys
from lightning_qat.function_hooks.running import current_forward_cache, hide_from_hooks
from lightning_qat.ir.quantize_calls import call_name
from lightning_qat.joins.first_forward import finish_plan
from lightning_qat.layers import QATLayer
from lightning_qat.numerics.arithmetic import dequantize, quantize
from lightning_qat.numerics.qparams import QParams
from lightning_qat.quantizers.activation import ParameterQuantizer
from lightning_qat.quantizers.switches import switch

Watch = Callable[[str, Tensor], Tensor]
"""Called with a call's name and its tensor; returns what readers of the tensor get."""


class Recorder(nn.Module):
    """Stands in for an activation quantizer.

    Args:
        key: The key of its tensor.
        watch: Called once for each tensor, however many layers read it.
    """

    def __init__(self, key: str, watch: Watch) -> None:
        super().__init__()
        self.key, self.watch = key, watch
        self.calls: Counter[str] = Counter()
        self.identity = object()
        self.idle = False

    def forward(self, x: Tensor, saves_input: bool = False) -> Tensor:
        """What ``watch`` makes of ``x``."""
        forward_cache = current_forward_cache()
        with hide_from_hooks():
            if forward_cache is None:
                return self._watched(x)
            # A relu before it may have been fused with the quantizer that stood here.
            x = forward_cache.relu_fusion.read(x)
            return forward_cache.quantize(
                x, self.identity, lambda x, _: self._watched(x), skip=False
            )

    def quantize_tied(self, values: list[Tensor]) -> list[Tensor]:
        """The same of the inputs of a concatenation."""
        return [self(value) for value in values]

    def _watched(self, x: Tensor) -> Tensor:
        name = call_name(self.key, self.calls[self.key])
        self.calls[self.key] += 1
        return self.watch(name, x)


class RecordedModel(NamedTuple):
    """A copy of a prepared model that shows its tensors.

    Args:
        model: The copy, in eval mode on the CPU.
        qparams: The numbers of every tensor that has a range, by key.
        unknown: Keys of the tensors without one.
        recorders: One per quantizer.
    """

    model: nn.Module
    qparams: Mapping[str, QParams]
    unknown: tuple[str, ...]
    recorders: tuple[Recorder, ...]

    @classmethod
    def of(cls, model: nn.Module) -> RecordedModel:
        """Copy a prepared model; it is not changed.

        Raises:
            ValueError: It has no QAT layers.
        """
        if not any(isinstance(module, QATLayer) for module in model.modules()):
            raise ValueError(
                f"{type(model).__name__} has no QAT layers, so nothing in it is quantized. Call "
                "prepare(model, recipe) and train first, or give the converted model."
            )
        finish_plan(model)
        copied = detached_copy(model)
        keys = {
            quantizer: key
            for quantizer, key in tensor_keys(copied).items()
            if not isinstance(quantizer, ParameterQuantizer)
        }
        recorders = {q: Recorder(key, _unchanged) for q, key in keys.items()}
        replace_quantizers(copied, recorders)
        known = {key: q.qparams() for q, key in keys.items() if q.why_not_final is None}
        unknown = tuple(key for key in keys.values() if key not in known)
        return cls(copied, known, unknown, tuple(recorders.values()))

    def run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], watch: Watch, *, quantizing: bool
    ) -> Any:
        """Run the copy.

        Args:
            args: Positional inputs.
            kwargs: Keyword inputs.
            watch: See ``Watch``.
            quantizing: Weights are quantized; activations are what ``watch`` returns.
        """
        switch(self.model, quantizing=quantizing, observing=False)
        for recorder in self.recorders:
            recorder.watch = watch
            recorder.calls.clear()
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def quantize(self, key: str, x: Tensor) -> Tensor:
        """A tensor on its grid, in float; unchanged where its range is not known."""
        qparams = self.qparams.get(key)
        if qparams is None or not x.is_floating_point():
            return x
        numbers = qparams.scale, qparams.zero_point
        return dequantize(quantize(x, *numbers, qparams.grid), *numbers).to(x.dtype)


def _unchanged(_name: str, x: Tensor) -> Tensor:
    return x
