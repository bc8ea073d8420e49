"""Small float networks of torch, one for each kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softmax


class Residual(nn.Module):
    """Batch norm, a sum, a mean over the pixels, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to ``(N, 4)``."""
        y = relu(self.norm(self.first(x)))
        z = relu(self.second(y) + y)
        out: Tensor = self.head(z.mean((2, 3)))
        return out


class Attention(nn.Module):
    """Attention written by hand: two products of activations."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, 8)`` to the same."""
        weights = softmax(self.query(x) @ self.key(x).transpose(1, 2) / 3, -1)
        out: Tensor = self.out(weights @ self.value(x))
        return out


class Recurrent(nn.Module):
    """An LSTM and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, 6)`` to ``(N, T, 4)``."""
        out: Tensor = self.head(self.rnn(x)[0])
        return out


def _depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 4, 1),
    )  # fmt: skip


def _classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU(),
        nn.Linear(16, 4),
    )  # fmt: skip


def _grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2))


def _dilated() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, dilation=2), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1)
    )


def _transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3),
    )  # fmt: skip


def _grouped_transposed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, groups=2))


def _one_dimension() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 8, 3, dilation=2), nn.ReLU(), nn.Conv1d(8, 4, 1))


def _three_dimensions() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 4, 1))


_NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 8, 8)),
    "depthwise": (_depthwise, (2, 3, 8, 8)),
    "mlp": (_mlp, (2, 3, 4, 4)),
    "classifier": (_classifier, (2, 3, 8, 8)),
    "grouped": (_grouped, (2, 3, 8, 8)),
    "dilated": (_dilated, (2, 3, 9, 9)),
    "transposed": (_transposed, (2, 3, 6, 6)),
    "grouped_transposed": (_grouped_transposed, (2, 3, 6, 6)),
    "conv1d": (_one_dimension, (2, 3, 16)),
    "conv3d": (_three_dimensions, (2, 2, 4, 4, 4)),
    "attention": (Attention, (2, 5, 8)),
    "lstm": (Recurrent, (2, 5, 6)),
}


def nets() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, network in eval mode with random weights and statistics, example input."""
    for name, (make, shape) in _NETS.items():
        torch.manual_seed(0)
        net = make()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
        net.train()
        with torch.no_grad():
            for batch in batches(torch.empty(shape)):
                net(batch)
        yield name, net.eval(), batches(torch.empty(shape))[0]


def batches(example: Tensor, count: int = 4) -> list[Tensor]:
    """Batches of the shape of an example to calibrate with."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(example.shape, generator=generator) for _ in range(count)]
