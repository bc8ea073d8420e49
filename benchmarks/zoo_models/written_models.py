"""Architectures without a library here, written the way that their papers' repositories do."""

# mypy: disable-error-code="no-any-return,no-untyped-call,operator"

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo_models.entry import Registry, images

REGISTRY = Registry("written")


class CRNN(nn.Module):
    """Text recognition: convolutions, then a bidirectional LSTM over the width."""

    def __init__(self, classes: int = 11) -> None:
        super().__init__()
        widths = (1, 16, 32, 32)
        self.cnn = nn.Sequential()
        for i, (w, v) in enumerate(pairwise(widths)):
            self.cnn.add_module(f"conv{i}", nn.Conv2d(w, v, 3, 1, 1))
            self.cnn.add_module(f"norm{i}", nn.BatchNorm2d(v))
            self.cnn.add_module(f"relu{i}", nn.ReLU(inplace=True))
            self.cnn.add_module(f"pool{i}", nn.MaxPool2d(2, (2, 1) if i == 2 else 2))
        self.rnn = nn.LSTM(32 * 2, 16, bidirectional=True)
        self.out = nn.Linear(32, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Log-probabilities (time, batch, classes) of images (batch, 1, 16, width)."""
        x = self.cnn(image)
        n, c, h, w = x.size()
        x = x.view(n, c * h, w).permute(2, 0, 1)
        x, _ = self.rnn(x)
        t, n, c = x.size()
        y = self.out(x.reshape(t * n, c)).view(t, n, -1)
        return F.log_softmax(y, dim=2)


class _GlobalNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, y: Tensor) -> Tensor:
        mean = y.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        var = ((y - mean) ** 2).mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        return self.gamma * (y - mean) / torch.pow(var + 1e-8, 0.5) + self.beta


class _Separable(nn.Module):
    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(channels, hidden, 1, bias=False),
            nn.PReLU(),
            _GlobalNorm(hidden),
            nn.Conv1d(
                hidden, hidden, 3, padding=dilation, dilation=dilation, groups=hidden, bias=False
            ),
            nn.PReLU(),
            _GlobalNorm(hidden),
            nn.Conv1d(hidden, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + x


class ConvTasNet(nn.Module):
    """Speech separation: an encoder, masks from dilated convolutions, a decoder."""

    def __init__(self, filters: int = 32, kernel: int = 8, speakers: int = 2) -> None:
        super().__init__()
        self.speakers, self.filters = speakers, filters
        self.encoder = nn.Conv1d(1, filters, kernel, stride=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(1, filters)
        self.bottleneck = nn.Conv1d(filters, 16, 1)
        self.blocks = nn.Sequential(*(_Separable(16, 32, 2**i) for i in range(3)))
        self.mask = nn.Conv1d(16, speakers * filters, 1)
        self.decoder = nn.ConvTranspose1d(filters, 1, kernel, stride=kernel // 2, bias=False)

    def forward(self, mixture: Tensor) -> Tensor:
        """Signals (batch, speakers, samples) of mixtures (batch, samples)."""
        w = F.relu(self.encoder(mixture.unsqueeze(1)))
        score = self.mask(self.blocks(self.bottleneck(self.norm(w))))
        score = score.view(mixture.shape[0], self.speakers, self.filters, -1)
        sources = w.unsqueeze(1) * F.softmax(score, dim=1)
        signal = self.decoder(sources.flatten(0, 1))
        return signal.view(mixture.shape[0], self.speakers, -1)


class _Chomp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class _TemporalBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int) -> None:
        super().__init__()
        pad = (kernel - 1) * dilation
        norm = nn.utils.parametrizations.weight_norm
        self.net = nn.Sequential(
            norm(nn.Conv1d(inputs, outputs, kernel, padding=pad, dilation=dilation)),
            _Chomp(pad),
            nn.ReLU(),
            nn.Dropout(0.1),
            norm(nn.Conv1d(outputs, outputs, kernel, padding=pad, dilation=dilation)),
            _Chomp(pad),
            nn.ReLU(),
            nn.Dropout(0.1),
        )
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        return self.relu(self.net(x) + residual)


class TCN(nn.Module):
    """Sequence classification by causal, dilated convolutions with weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tcn = nn.Sequential(
            *(_TemporalBlock(i, 16, 3, d) for i, d in ((4, 1), (16, 2), (16, 4)))
        )
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of sequences (batch, 4, time)."""
        return self.linear(self.tcn(x)[:, :, -1])


class _Transform(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.conv1, self.conv2 = nn.Conv1d(size, 16, 1), nn.Conv1d(16, 64, 1)
        self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, size * size)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(16), nn.BatchNorm1d(64), nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 64)
        x = self.fc2(F.relu(self.bn3(self.fc1(x))))
        identity = torch.eye(self.size, device=x.device).flatten().view(1, -1).repeat(x.size(0), 1)
        return (x + identity).view(-1, self.size, self.size)


class PointNet(nn.Module):
    """Classification of point clouds, with a learned transformation of the points."""

    def __init__(self) -> None:
        super().__init__()
        self.stn = _Transform(3)
        self.conv1, self.conv2 = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 64, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(64)
        self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, 10)
        self.bn3, self.dropout = nn.BatchNorm1d(32), nn.Dropout(0.3)

    def forward(self, points: Tensor) -> Tensor:
        """Log-probabilities of points (batch, 3, points)."""
        x = torch.bmm(points.transpose(2, 1), self.stn(points)).transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x)).max(dim=2)[0]
        x = F.relu(self.bn3(self.dropout(self.fc1(x))))
        return F.log_softmax(self.fc2(x), dim=-1)


class DLRM(nn.Module):
    """Recommendation: embeddings of categories, pairwise products, two perceptrons."""

    def __init__(self, tables: int = 3, width: int = 8) -> None:
        super().__init__()
        self.emb = nn.ModuleList(nn.EmbeddingBag(20, width, mode="sum") for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(
            nn.Linear(width + pairs, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid()
        )

    def forward(self, dense: Tensor, categories: Tensor) -> Tensor:
        """Probabilities of dense features (batch, 4) and categories (batch, 3, 2)."""
        x = self.bottom(dense)
        found = [table(categories[:, i]) for i, table in enumerate(self.emb)]
        batch, width = x.shape
        t = torch.cat([x, *found], dim=1).view(batch, -1, width)
        products = torch.bmm(t, torch.transpose(t, 1, 2))
        _, ni, nj = products.shape
        row = torch.tensor([i for i in range(ni) for j in range(i)])
        column = torch.tensor([j for i in range(nj) for j in range(i)])
        return self.top(torch.cat([x, products[:, row, column]], dim=1))


class _ResnetBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
            nn.ReLU(True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class CycleGAN(nn.Module):
    """Image translation: a generator of reflection padding, instance norm and tanh."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.ReflectionPad2d(3),
            nn.Conv2d(3, width, 7),
            nn.InstanceNorm2d(width),
            nn.ReLU(True),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.InstanceNorm2d(2 * width),
            nn.ReLU(True),
            _ResnetBlock(2 * width),
            _ResnetBlock(2 * width),
            nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1),
            nn.InstanceNorm2d(width),
            nn.ReLU(True),
            nn.ReflectionPad2d(3),
            nn.Conv2d(width, 3, 7),
            nn.Tanh(),
        )

    def forward(self, image: Tensor) -> Tensor:
        """An image of the same shape."""
        return self.model(image)


class SuperResolution(nn.Module):
    """Super-resolution: residual blocks, pixel shuffle, added to the bilinear image."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.PReLU(width),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.tail = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """An image of twice the size."""
        y = self.head(x)
        for block in self.body:
            y = y + 0.1 * block(y)
        up = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return torch.clamp(self.tail(y) + up, -3.0, 3.0)


class _ConvBlock(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(inplace=True),
        )


class _C2f(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1 = _ConvBlock(inputs, 2 * self.c, 1)
        self.m = nn.ModuleList(
            nn.Sequential(_ConvBlock(self.c, self.c, 3), _ConvBlock(self.c, self.c, 3))
            for _ in range(2)
        )
        self.cv2 = _ConvBlock(4 * self.c, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class YOLO(nn.Module):
    """A detector whose boxes are decoded from grid cells in eval mode."""

    project: Tensor

    def __init__(self, classes: int = 3, bins: int = 4) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.stem = nn.Sequential(_ConvBlock(3, 8, 3, 2), _ConvBlock(8, 16, 3, 2), _C2f(16, 16))
        self.down = nn.Sequential(_ConvBlock(16, 32, 3, 2), _C2f(32, 32))
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.spp = _ConvBlock(64, 32, 1)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.top = _C2f(48, 16)
        self.heads = nn.ModuleList(nn.Conv2d(w, 4 * bins + classes, 1) for w in (16, 32))
        self.register_buffer("project", torch.arange(bins, dtype=torch.float32))

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """In eval mode boxes and scores (batch, 4 + classes, cells), else the raw maps."""
        p2 = self.stem(image)
        p3 = self.down(p2)
        p3 = self.spp(torch.cat([p3, self.pool(p3)], 1))
        p2 = self.top(torch.cat([self.up(p3), p2], 1))
        maps = [head(p) for head, p in zip(self.heads, (p2, p3), strict=True)]
        if self.training:
            return maps
        anchors, strides = [], []
        for p, stride in zip(maps, (4.0, 8.0), strict=True):
            h, w = p.shape[2:]
            sy, sx = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            anchors.append(torch.stack((sx, sy), -1).view(-1, 2))
            strides.append(torch.full((h * w, 1), stride))
        points, scale = torch.cat(anchors).transpose(0, 1), torch.cat(strides).transpose(0, 1)
        flat = torch.cat([p.flatten(2) for p in maps], 2)
        box, score = flat.split((4 * self.bins, self.classes), 1)
        b, _, cells = box.shape
        distances = box.view(b, 4, self.bins, cells).transpose(2, 1).softmax(1)
        distances = (distances * self.project.view(1, -1, 1, 1)).sum(1)
        lt, rb = distances.chunk(2, 1)
        corners = torch.cat((points - lt, points + rb), 1) * scale
        return torch.cat((corners, score.sigmoid()), 1)


REGISTRY.add("crnn", CRNN, lambda: (torch.randn(2, 1, 16, 32),))
REGISTRY.add("convtasnet", ConvTasNet, lambda: (torch.randn(2, 160),))
REGISTRY.add("tcn", TCN, lambda: (torch.randn(2, 4, 32),))
REGISTRY.add("pointnet", PointNet, lambda: (torch.randn(4, 3, 32),))
REGISTRY.add("dlrm", DLRM, lambda: (torch.randn(4, 4), torch.randint(0, 20, (4, 3, 2))))
REGISTRY.add("cyclegan", CycleGAN, images(32))
REGISTRY.add("superres", SuperResolution, images(16))
REGISTRY.add("yolo", YOLO, images(64))
