"""Segmentation: discs, squares and triangles in noise, a small U-Net."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.task import Data, Task

SIDE, PICTURES = 32, 512
CLASSES = 4
"""Background, disc, square, triangle."""


def data(seed: int) -> Data:
    """As many pictures to train as to test; labels (pictures, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    made = [pictures(PICTURES, generator) for _ in range(2)]
    return Data(*made[0], *made[1])


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three shapes of any grey each, the later ones in front; noise as strong as they are."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    x, y = torch.zeros(count, SIDE, SIDE), torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    for _ in range(3):
        kind = (draw(1, 1) * 3).long()
        size = 4 + 5 * draw(1, 1)
        down, right = (rows - SIDE * draw(1, 1)) / size, (columns - SIDE * draw(1, 1)) / size
        inside = torch.where(
            kind == 0,
            down.square() + right.square() < 1,
            torch.where(
                kind == 1,
                torch.maximum(down.abs(), right.abs()) < 0.9,
                (down.abs() < 1) & (right.abs() < (1 + down) / 2),
            ),
        )
        x = torch.where(inside, 0.5 + draw(1, 1), x)
        y = torch.where(inside, 1 + kind, y)
    return (x + 0.4 * torch.randn(x.shape, generator=generator))[:, None], y


class UNet(nn.Module):
    """Three levels; what goes up is joined with what went down."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def pair(inputs: int, outputs: int) -> nn.Module:
            layers: list[nn.Module] = []
            for channels in (inputs, outputs):
                convolution = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
            return nn.Sequential(*layers)

        self.first, self.second = pair(1, width), pair(width, 2 * width)
        self.bottom = pair(2 * width, 4 * width)
        self.fourth, self.fifth = pair(6 * width, 2 * width), pair(3 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes, side, side) of pictures (batch, 1, side, side)."""
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        bottom = self.bottom(F.max_pool2d(second, 2))
        x = self.fourth(torch.cat((F.interpolate(bottom, scale_factor=2.0), second), 1))
        x = self.fifth(torch.cat((F.interpolate(x, scale_factor=2.0), first), 1))
        logits: Tensor = self.head(x)
        return logits


def mean_iou(outputs: Tensor, labels: Tensor) -> float:
    """Intersection over union of each class over all pictures, their mean in percent."""
    found = outputs.argmax(1)
    shares: list[Any] = []
    for kind in range(CLASSES):
        both = ((found == kind) & (labels == kind)).sum()
        either = ((found == kind) | (labels == kind)).sum()
        shares.append(both / either)
    return 100.0 * float(torch.stack(shares).mean())


# With fewer epochs, or the usual rate, some networks have not learned the shapes yet: they go on
# learning while they are quantized, and what disturbs them more then looks better.
SHAPES = Task(
    "shapes, U-Net", "mean IoU", data, UNet, float_epochs=60, float_rate=6e-3, score=mean_iou
)
