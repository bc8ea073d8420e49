"""Small networks of the kinds whose joins matter: residual, gated, concatenating, attending."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> Any:
    """A convolution that keeps the size, and its batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class BasicBlock(nn.Module):
    """ResNet's block of two convolutions, relu in place and ``+=`` as in torchvision."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = conv_bn(inputs, outputs, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += identity
        return self.relu(y)


class ResNet(nn.Module):
    """Blocks in stages, each of twice the width of the one before; takes (batch, 3, 16, 16).

    Two stages have every kind: a block that adds the stem's output, one that adds a block's, and
    one that widens.
    """

    def __init__(self, stages: Sequence[int] = (2, 1), width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        blocks, inputs = [], width
        for stage, count in enumerate(stages):
            for number in range(count):
                outputs = width * 2**stage
                blocks.append(BasicBlock(inputs, outputs, 2 if stage and not number else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.pool(x), 1))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, depthwise, narrow, add."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 2 * inputs
        self.expand = nn.Sequential(conv_bn(inputs, hidden, 1), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(inplace=True)
        )
        self.project = conv_bn(hidden, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """Inverted residuals between a stem and a head; takes (batch, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, 3, 2), nn.ReLU6(inplace=True))
        self.blocks = nn.Sequential(
            InvertedResidual(8, 8, 1), InvertedResidual(8, 8, 1), InvertedResidual(8, 12, 2)
        )
        self.head = nn.Sequential(conv_bn(12, 24, 1), nn.ReLU6(inplace=True))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SqueezeExcite(nn.Module):
    """Gates channels by what the whole picture holds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1)
        self.widen = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))
        return x * F.hardsigmoid(self.widen(gate))


class MobileNetV3Block(nn.Module):
    """Hardswish, depthwise, squeeze and excite, add; takes (batch, 8, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(conv_bn(8, 16, 1), nn.Hardswish(inplace=True))
        self.depthwise = nn.Sequential(conv_bn(16, 16, 3, groups=16), nn.Hardswish(inplace=True))
        self.gate = SqueezeExcite(16)
        self.project = conv_bn(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.gate(self.depthwise(self.expand(x))))


class DenseBlock(nn.Module):
    """Every layer reads all earlier ones, then a transition; takes (batch, 6, 8, 8)."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(6, 6), nn.ReLU())
        self.layers = nn.ModuleList(
            nn.Sequential(conv_bn(6 + 4 * i, 4), nn.ReLU()) for i in range(layers)
        )
        self.transition = nn.Sequential(conv_bn(6 + 4 * layers, 8, 1), nn.ReLU(), nn.AvgPool2d(2))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return self.fc(self.transition(torch.cat(found, 1)).mean((2, 3)))


class UNet(nn.Module):
    """Two levels, nearest upsampling, concatenated skips; takes (batch, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv_bn(3, 6), nn.ReLU())
        self.down2 = nn.Sequential(conv_bn(6, 8), nn.ReLU())
        self.bottom = nn.Sequential(conv_bn(8, 8), nn.ReLU())
        self.up2 = nn.Sequential(conv_bn(16, 6), nn.ReLU())
        self.up1 = nn.Sequential(conv_bn(12, 6), nn.ReLU())
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.bottom(F.max_pool2d(two, 2))
        y = self.up2(torch.cat((F.interpolate(y, scale_factor=2, mode="nearest"), two), 1))
        y = self.up1(torch.cat((F.interpolate(y, scale_factor=2, mode="nearest"), one), 1))
        return self.out(y)


class Skip(nn.Module):
    """One level of ``UNet``; takes (batch, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(conv_bn(3, 6), nn.ReLU())
        self.bottom = nn.Sequential(conv_bn(6, 8), nn.ReLU())
        self.out = nn.Conv2d(14, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        y = self.bottom(F.max_pool2d(x, 2))
        return self.out(torch.cat((F.interpolate(y, scale_factor=2, mode="nearest"), x), 1))


class EncoderBlock(nn.Module):
    """Attention with its own projections and a gelu MLP; takes (batch, 6, 16)."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Inception(nn.Module):
    """Four branches, one of them an average pool, concatenated; takes (batch, 6, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(conv_bn(6, 4, 1), nn.ReLU())
        self.three = nn.Sequential(conv_bn(6, 4, 1), nn.ReLU(), conv_bn(4, 6), nn.ReLU())
        self.five = nn.Sequential(conv_bn(6, 3, 1), nn.ReLU(), conv_bn(3, 4, 5), nn.ReLU())
        self.pool = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        self.pooled = nn.Sequential(conv_bn(6, 4, 1), nn.ReLU())
        self.fc = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.one(x), self.three(x), self.five(x), self.pooled(self.pool(x)))
        return self.fc(F.adaptive_avg_pool2d(torch.cat(branches, 1), 1).flatten(1))


class Branches(nn.Module):
    """One branch of ``Inception`` of each kind; takes (batch, 6, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(conv_bn(6, 4, 1), nn.ReLU())
        self.pool = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        self.pooled = nn.Sequential(conv_bn(6, 4, 1), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.one(x), self.pooled(self.pool(x)))
        return self.fc(F.adaptive_avg_pool2d(torch.cat(branches, 1), 1).flatten(1))


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "resnet8": (ResNet, (3, 16, 16)),
    "mobilenet_v2": (MobileNetV2, (3, 16, 16)),
    "mobilenet_v3_block": (MobileNetV3Block, (8, 8, 8)),
    "dense_block": (DenseBlock, (6, 8, 8)),
    "unet": (UNet, (3, 16, 16)),
    "encoder_block": (EncoderBlock, (6, 16)),
    "inception": (Inception, (6, 8, 8)),
}
"""Name to the network's maker and the shape of one sample."""

FULL: dict[str, tuple[Any, tuple[int, ...]]] = {
    "resnet20": (lambda: ResNet((3, 3, 3)), (3, 16, 16)),
}
"""Has no other parts than the above, but is as deep as networks are; for one test per target."""

PIECES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "inverted residual": (lambda: InvertedResidual(8, 8, 1), (8, 8, 8)),
    "mobilenet_v3_block": NETWORKS["mobilenet_v3_block"],
    "dense": (lambda: DenseBlock(layers=1), (6, 8, 8)),
    "skip": (Skip, (3, 16, 16)),
    "encoder_block": NETWORKS["encoder_block"],
    "branches": (Branches, (6, 8, 8)),
}
"""What ``NETWORKS`` are made of, besides residual blocks; torch's compiler is slow per layer."""

CNNS = tuple(name for name in NETWORKS if name != "encoder_block")


def inputs_for(name: str, samples: int = 4) -> Tensor:
    """Random inputs of one of the networks or pieces."""
    return torch.randn(samples, *(NETWORKS | FULL | PIECES)[name][1])


def train_steps(model: nn.Module, x: Tensor, steps: int = 3) -> nn.Module:
    """Real training on random data that looks like ``x``; the model ends in eval mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(torch.randn_like(x))
        F.mse_loss(output, torch.randn_like(output)).backward()
        optimizer.step()
    return model.eval()
