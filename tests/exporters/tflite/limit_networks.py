"""Networks whose scales LiteRT's integer kernels would end the whole process with."""

import torch
from torch import Tensor, nn


class TinyScores(nn.Module):
    """Softmax of numbers around 1e-9, as of the scores of attention that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.before.weight.mul_(1e-9)
            self.before.bias.mul_(1e-9)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self.before(x).softmax(-1))
        return result


class ZerosAdded(nn.Module):
    """DETR's first target: zeros for every sample, which the converter gives the scale 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.queries = nn.Parameter(torch.ones(1, 8))
        with torch.no_grad():
            self.layer.weight.mul_(1e-6)
            self.layer.bias.mul_(1e-6)

    def forward(self, x: Tensor) -> Tensor:
        target = torch.zeros_like(self.queries.repeat(x.shape[0], 1))
        result: Tensor = self.layer(x) + target
        return result


class LargeConstantCancelled(nn.Module):
    """A constant takes the offset of the input away: the sum is tiny beside both."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Linear(8, 2)
        self.register_buffer("offset", torch.full((8,), 1e6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(x + self.offset)
        return result
