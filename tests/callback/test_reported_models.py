"""Models as people reported them, trained by a Trainer and exported to two targets at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.layers import QATLayer
from tests.callback.tiny import Net, loader, qat


class SharedActivation(Net):
    """One SiLU for all layers, as Ultralytics has it."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.more = nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = self.act(self.bn(self.conv(x)))
        x = self.act(self.more(x))
        return self.head(x.mean((2, 3)))


class LowRank(Net):
    """A frozen layer beside two low-rank factors."""

    def __init__(self) -> None:
        super().__init__()
        self.head.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.head(x) + x @ self.a.T @ self.b.T


class Output(NamedTuple):
    logits: Tensor
    features: Tensor


class Named(Net):
    """Returns a named tuple."""

    def forward(self, x: Tensor) -> Any:
        features = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return Output(self.head(features), features)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]).logits, batch[1])


class Upsamples(Net):
    """A grouped transposed convolution with batch norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(4, 8, 2, 2, groups=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.up(F.relu(self.bn(self.conv(x))))))
        return self.head(x.mean((2, 3)))


class Helper(Net):
    """A function of the user that two places call."""

    def forward(self, x: Tensor) -> Any:
        x = swish(swish(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Iterates(Net):
    """A Sequential with a forward of its own, as DeepLabV3's image pooling has it."""

    class Pooling(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            size = x.shape[-2:]
            for layer in self:
                x = layer(x)
            return F.interpolate(x, size=size, mode="nearest") * len(self)

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.Pooling(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn(self.conv(x)))
        return self.head((x + self.pool(x)).mean((2, 3)))


@pytest.mark.parametrize("kind", [SharedActivation, LowRank, Named, Upsamples, Helper, Iterates])
def test_every_target_has_the_trained_numbers(
    trainer: Callable[..., L.Trainer], tmp_path: Path, kind: Any
) -> None:
    torch.manual_seed(0)
    net = kind()
    callback = qat(exporters=["fake_quant_onnx", "cann"], export_dir=tmp_path)
    trainer(callback).fit(net, loader())
    assert [result.error for result in callback.delivered] == [None, None]
    for result in callback.delivered:
        assert result.agreement is not None
        assert result.agreement.max_steps <= 1, str(result.agreement)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.ConvTranspose2d)]
    assert all(isinstance(layer, QATLayer) for layer in layers)
