"""Quantizers whose numbers are final, as ``torch.export`` captures them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from lightning_qat.function_hooks.running import current_forward_cache, hide_from_hooks
from lightning_qat.ir.ops import dequantize_node, fake_quantize_node
from lightning_qat.numerics.arithmetic import along_channels, quantize
from lightning_qat.numerics.qparams import QParams


class FinalActivation(nn.Module):
    """An activation's numbers, final: one explicit ``lightning_qat::fake_quantize`` node.

    Args:
        qparams: The numbers, per tensor.
        key: Name of the tensor in the table of the converted model, such as ``net.conv1.input``.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qparams: QParams, key: str) -> None:
        super().__init__()
        self.register_buffer("scale", qparams.scale.clone())
        self.register_buffer("zero_point", qparams.zero_point.clone())
        self.grid, self.key = qparams.grid, key
        # torch.export hands modules out behind proxies, so the module's own identity varies.
        self.identity = object()
        self.idle = False

    def forward(self, x: Tensor, saves_input: bool = False) -> Tensor:
        """Fake-quantize ``x``; one node per tensor, however many consumers it has."""
        forward_cache = current_forward_cache()
        if forward_cache is None:
            return self._quantize(x)
        with hide_from_hooks():
            return forward_cache.quantize(
                x, self.identity, lambda x, _: self._quantize(x), skip=False
            )

    def quantize_tied(self, values: list[Tensor]) -> list[Tensor]:
        """Fake-quantize the inputs of a concatenation."""
        return [self(value) for value in values]

    def _quantize(self, x: Tensor) -> Tensor:
        result: Tensor = fake_quantize_node(
            x, self.scale, self.zero_point, self.grid.qmin, self.grid.qmax, self.key
        )
        return result


class UnknownRange(nn.Module):
    """In the place of an activation's numbers that are not known: it notes whether it runs.

    Args:
        key: Name of the tensor.
        why: The reason why its range is unknown.

    Attributes:
        reached: The forward has run it.
    """

    def __init__(self, key: str, why: str) -> None:
        super().__init__()
        self.key, self.why = key, why
        # torch.export runs a stand-in for the module: it shares this object, but copies a list.
        self._run = SimpleNamespace(reached=False)

    @property
    def reached(self) -> bool:
        """Whether the forward has run it."""
        return bool(self._run.reached)

    def forward(self, x: Tensor, saves_input: bool = False) -> Tensor:
        """Pass ``x`` on."""
        self._run.reached = True
        return x

    def quantize_tied(self, values: list[Tensor]) -> list[Tensor]:
        """Pass the inputs of a concatenation on."""
        return [self(value) for value in values]


class FinalWeight(nn.Module):
    """A weight's integers and numbers, final: one explicit ``lightning_qat::dequantize`` node.

    Args:
        integers: The weight on the grid.
        qparams: The numbers.
        key: Name of the tensor in the table of the converted model, such as ``net.conv1.weight``.
    """

    integers: Tensor
    scale: Tensor

    def __init__(self, integers: Tensor, qparams: QParams, key: str) -> None:
        super().__init__()
        self.register_buffer("integers", integers)
        self.register_buffer("scale", qparams.scale.clone())
        self.grid, self.axis, self.key = qparams.grid, qparams.axis, key
        self.idle = False

    @classmethod
    def from_weight(cls, weight: Tensor, qparams: QParams, key: str) -> FinalWeight:
        """Round a float weight once and for all."""
        weight = weight.detach().to("cpu", torch.float32)
        scale = along_channels(qparams.scale, weight.shape, qparams.axis)
        zero_point = torch.zeros((), dtype=torch.int32)
        return cls(quantize(weight, scale, zero_point, qparams.grid), qparams, key)

    def named(self, key: str) -> FinalWeight:
        """The same tensors under another key, for a weight that several layers share."""
        zeros = torch.zeros_like(self.scale, dtype=torch.int32)
        twin = FinalWeight(self.integers, QParams(self.scale, zeros, self.grid, self.axis), key)
        twin.scale = self.scale
        return twin

    def forward(self, weight: Tensor | None) -> Tensor:
        """The real value of the integers; the float weight is gone and ignored."""
        result: Tensor = dequantize_node(
            self.integers, self.scale, self.grid.qmin, self.grid.qmax, self.axis, self.key
        )
        return result
