"""What the tests of prepare share."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.quantizers.base import Quantizer


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}


class Aliased(nn.Module):
    """One linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(F.relu(self.first(x))))


def types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


# What is skipped


class OwnLinear(nn.Linear):
    pass
