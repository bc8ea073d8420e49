"""The networks that the benchmarks train: float, with torch's own layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    layer = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(cout))


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(cin, cout, 3, stride), conv(cout, cout, 3)
        self.shortcut = nn.Identity() if cin == cout and stride == 1 else conv(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Block on ``(batch, cin, height, width)``."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class Inverted(nn.Module):
    """1x1, depthwise 3x3, 1x1; a shortcut where shapes allow it."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        self.expand = conv(cin, hidden, 1)
        self.depthwise = conv(hidden, hidden, 3, stride, hidden)
        self.project = conv(hidden, cout, 1)
        self.same = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        """Block on ``(batch, cin, height, width)``."""
        y: Tensor = self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        return x + y if self.same else y


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 to four times the width, and a shortcut."""

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        cout = 4 * width
        self.first, self.second = conv(cin, width, 1), conv(width, width, 3, stride)
        self.third = conv(width, cout, 1)
        self.shortcut = nn.Identity() if cin == cout and stride == 1 else conv(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Block on ``(batch, cin, height, width)``."""
        y = self.third(F.relu(self.second(F.relu(self.first(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18(width: int = 64) -> nn.Module:
    """ResNet-18 for 32x32 images."""
    layers: list[nn.Module] = [conv(3, width, 3), nn.ReLU()]
    cin = width
    for stage, cout in enumerate((width, 2 * width, 4 * width, 8 * width)):
        layers += [Residual(cin, cout, 2 if stage else 1), Residual(cout, cout, 1)]
        cin = cout
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, 10))


def resnet50(width: int = 64, counts: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    """ResNet-50 for 224x224 images; ``counts``: blocks per stage."""
    layers: list[nn.Module] = [conv(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    cin = width
    for stage, count in enumerate(counts):
        for index in range(count):
            layers.append(Bottleneck(cin, width << stage, 2 if stage and not index else 1))
            cin = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, 1000))


def mobilenet(width: int = 32) -> nn.Module:
    """A MobileNetV2-style net for 32x32 images."""
    layers: list[nn.Module] = [conv(3, width, 3), nn.ReLU()]
    cin = width
    for cout, count, stride in ((width, 2, 1), (2 * width, 3, 2), (3 * width, 4, 2)):
        for index in range(count):
            layers.append(Inverted(cin, cout, stride if index == 0 else 1, 6))
            cin = cout
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, 10))


class EncoderLayer(nn.Module):
    """Self-attention and two linear layers, each with a residual and a layer norm before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def _split(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        return x.view(batch, time, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Layer on ``(batch, time, width)``."""
        y = self.norm1(x)
        query, key, value = (self._split(f(y)) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


def patches(x: Tensor) -> Tensor:
    """The 64 patches of 4x4 pixels of ``(batch, 3, 32, 32)``: ``(batch, 64, 48)``."""
    tiles = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
    return tiles.flatten(3).flatten(1, 2)


class Encoder(nn.Module):
    """A transformer encoder over patches of 32x32 images, averaged over time."""

    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Linear(48, width)
        self.layers = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``(batch, 3, 32, 32)``."""
        logits: Tensor = self.head(self.layers(self.patches(patches(x))).mean(1))
        return logits


class Attention(nn.Module):
    """Two of torch's encoder layers, with ``nn.MultiheadAttention``, over the same patches."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True)
        self.patches = nn.Linear(48, width)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``(batch, 3, 32, 32)``."""
        logits: Tensor = self.head(self.layers(self.patches(patches(x))).mean(1))
        return logits


class Recurrent(nn.Module):
    """An LSTM over the rows of 32x32 images."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(96, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``(batch, 3, 32, 32)``."""
        output, _ = self.lstm(x.permute(0, 2, 1, 3).flatten(2))
        logits: Tensor = self.head(output[:, -1])
        return logits
