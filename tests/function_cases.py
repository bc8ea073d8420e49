"""Functions that people call between layers, and what becomes of each."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = (2, 4, 6, 6)


class Case(NamedTuple):
    """A function of a tensor of ``SHAPE``.

    Args:
        call: The function.
        becomes: Its input is quantized; its output keeps the input's grid; or it is named as float.
    """

    call: Callable[[Tensor], Tensor]
    becomes: Literal["quantized", "passed", "named"]


def _grid(x: Tensor) -> Tensor:
    lines = torch.linspace(-0.9, 0.9, 5)
    y, x_ = torch.meshgrid(lines, lines, indexing="ij")
    return torch.stack((x_, y), -1).expand(x.shape[0], -1, -1, -1)


_SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])
_HALF = torch.arange(36).view(6, 6) % 2 == 0

CASES: dict[str, Case] = {
    "prelu": Case(lambda x: F.prelu(x, _SLOPES), "quantized"),
    "leaky_relu": Case(lambda x: F.leaky_relu(x, 0.1), "quantized"),
    "elu": Case(F.elu, "quantized"),
    "selu": Case(F.selu, "quantized"),
    "celu": Case(F.celu, "quantized"),
    "mish": Case(F.mish, "quantized"),
    "softplus": Case(F.softplus, "quantized"),
    "glu": Case(lambda x: F.glu(x, 1), "quantized"),
    "abs": Case(lambda x: x.abs(), "quantized"),
    "neg": Case(lambda x: -x, "quantized"),
    "pow": Case(lambda x: x**2, "quantized"),
    "square": Case(torch.square, "quantized"),
    "var": Case(lambda x: x.var(1), "quantized"),
    "std": Case(lambda x: x.std((2, 3)), "quantized"),
    "cumsum": Case(lambda x: x.cumsum(2), "quantized"),
    "normalize": Case(lambda x: F.normalize(x, dim=1), "quantized"),
    "maximum": Case(lambda x: torch.maximum(x, x.flip(3)), "quantized"),
    "grid_sample": Case(lambda x: F.grid_sample(x, _grid(x), align_corners=False), "quantized"),
    "bilinear": Case(
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
        "quantized",
    ),
    "group_norm": Case(lambda x: F.group_norm(x, 2), "quantized"),
    "instance_norm": Case(F.instance_norm, "quantized"),
    "rms_norm": Case(lambda x: F.rms_norm(x, (6,)), "quantized"),
    "einsum, a product": Case(lambda x: torch.einsum("bchw,bcvw->bchv", x, x.flip(2)), "quantized"),
    "einsum, of many axes": Case(
        lambda x: torch.einsum("bchw,bdhw->bdc", x, x.flip(1)), "quantized"
    ),
    "baddbmm": Case(
        lambda x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2], beta=0.5, alpha=0.3), "quantized"
    ),
    "amax": Case(lambda x: x.amax((2, 3)), "passed"),
    "amin": Case(lambda x: x.amin(1), "passed"),
    "max": Case(lambda x: x.max(1).values, "passed"),
    "min": Case(lambda x: x.min(1)[0], "passed"),
    "topk": Case(lambda x: x.topk(2, dim=1).values, "passed"),
    "sort": Case(lambda x: x.sort(dim=1)[0], "passed"),
    "gather": Case(
        lambda x: x.gather(1, torch.arange(x.shape[0])[:, None, None, None].expand(-1, 2, 6, 6)),
        "passed",
    ),
    "tril": Case(lambda x: x.tril(), "passed"),
    "masked_fill with zero": Case(lambda x: x.masked_fill(_HALF, 0.0), "passed"),
    "reshape_as": Case(lambda x: x.reshape_as(x.transpose(1, 2)), "passed"),
    "expand_as": Case(lambda x: x[:, :1].expand_as(x), "passed"),
    "repeat": Case(lambda x: x.repeat(1, 2, 1, 1), "passed"),
    "repeat_interleave": Case(lambda x: x.repeat_interleave(2, dim=1), "passed"),
    "roll": Case(lambda x: x.roll((1, 2), (2, 3)), "passed"),
    "pixel_shuffle": Case(lambda x: F.pixel_shuffle(x, 2), "passed"),
    "clamp": Case(lambda x: x.clamp(0.1, 0.9), "named"),
    "sqrt": Case(lambda x: (x * x).sqrt(), "named"),
    "div by a number": Case(lambda x: x / 3.0, "named"),
    "where": Case(lambda x: torch.where(_HALF, x, 1.0), "named"),
    "masked_fill": Case(lambda x: x.masked_fill(_HALF, 7.0), "named"),
    "pow below 1": Case(lambda x: x.abs() ** 0.5, "named"),
    "einsum, no product": Case(lambda x: torch.einsum("bchw,c->bchw", x, _SLOPES), "named"),
}


class One(nn.Module):
    """A function between two layers."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.call = nn.Conv2d(3, 4, 1), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.conv(x))


class Many(nn.Module):
    """Several functions of one tensor, each an output."""

    def __init__(self, calls: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 4, 1), calls

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(x)
        return tuple(call(y) for call in self.calls)
