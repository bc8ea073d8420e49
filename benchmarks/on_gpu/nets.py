"""The networks of `benchmarks.gpu`, for images of 224 x 224, and narrow twins for a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.nets import EncoderLayer, Inverted, conv, resnet50


def mobilenet_v2(width: int = 32, counts: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1)) -> nn.Module:
    """MobileNetV2 (arXiv:1801.04381, table 2) of width 1; its first block expands as the others."""
    layers: list[nn.Module] = [conv(3, width, 3, 2), nn.ReLU6()]
    cin = width
    widths = (width // 2, 3 * width // 4, width, 2 * width, 3 * width, 5 * width, 10 * width)
    for cout, count, stride in zip(widths, counts, (1, 2, 2, 2, 1, 2, 1), strict=True):
        for index in range(count):
            expand = 1 if cin == width and cout == width // 2 else 6
            layers.append(Inverted(cin, cout, 1 if index else stride, expand))
            cin = cout
    layers += [conv(cin, 40 * width, 1), nn.ReLU6()]
    head = nn.Linear(40 * width, 1000)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class VisionEncoder(nn.Module):
    """A transformer encoder over patches of 16 x 16 pixels, averaged over time; ViT-S by default.

    Args:
        size: Pixels of a side of the image.
        width: Features of a patch.
        depth: The number of layers.
    """

    def __init__(self, size: int = 224, width: int = 384, depth: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // 16) ** 2, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, width // 64) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``(batch, 3, size, size)``."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return logits


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of ``(batch, channels, height, width)``."""

    def forward(self, input: Tensor) -> Tensor:
        """The same shape; channels_last in, channels_last out."""
        normed: Tensor = super().forward(input.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """7x7 depthwise, layer norm, two linear layers with gelu between them, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Block on ``(batch, width, height, width)``."""
        y: Tensor = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext(width: int = 96, counts: tuple[int, ...] = (3, 3, 9, 3)) -> nn.Module:
    """ConvNeXt-T (arXiv:2201.03545), without stochastic depth."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), ChannelNorm(width)]
    for stage, count in enumerate(counts):
        cout = width << stage
        if stage:
            layers += [ChannelNorm(cout // 2), nn.Conv2d(cout // 2, cout, 2, 2)]
        layers += [ConvNextBlock(cout) for _ in range(count)]
    last = width << (len(counts) - 1)
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(last)]
    return nn.Sequential(*layers, *pooled, nn.Linear(last, 1000))


@dataclass(frozen=True)
class Net:
    """One network of the table.

    Args:
        title: How the table calls it.
        make: The network.
        narrow: A twin of few channels and layers, for images of 32 x 32.
        batches: Images per step, the more telling size first.
    """

    title: str
    make: Callable[[], nn.Module]
    narrow: Callable[[], nn.Module]
    batches: tuple[int, ...]


NETS: Mapping[str, Net] = {
    "resnet50": Net("ResNet-50", resnet50, lambda: resnet50(8, (1, 1)), (256, 128)),
    "mobilenet": Net("MobileNetV2", mobilenet_v2, lambda: mobilenet_v2(8, (1,) * 7), (256,)),
    "vit": Net("ViT-S-like", VisionEncoder, lambda: VisionEncoder(32, 64, 2), (128,)),
    "convnext": Net("ConvNeXt-T-like", convnext, lambda: convnext(8, (1, 1)), (128,)),
}

NARROW_BATCH = 4
"""Images per step of a narrow network, whatever the row says."""


def network(name: str, batch: int, narrow: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, its images and their classes, on the CPU; the same for every process."""
    torch.manual_seed(0)
    net = NETS[name].narrow() if narrow else NETS[name].make()
    size, count = (32, NARROW_BATCH) if narrow else (224, batch)
    return net, torch.randn(count, 3, size, size), torch.randint(0, 1000, (count,))
