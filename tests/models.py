"""Tiny networks used everywhere, and what most tests do with them first; without Lightning."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec


def linear() -> nn.Module:
    """Linear, relu, linear; takes (batch, 6), and (batch, time, 6) as well."""
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def conv_bn_relu() -> nn.Module:
    """Two convolutions, each with a batch norm; takes (batch, 2, 6, 6)."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, stride=2),
        nn.BatchNorm2d(3),
    )


def depthwise() -> nn.Module:
    """A depthwise and a pointwise convolution; takes (batch, 4, 6, 6)."""
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 3, 1)
    )


class ResidualAdd(nn.Module):
    """A block whose input is added to its output; takes (batch, 4, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.conv2(y) + x)
        return self.head(y.mean((2, 3)))


class Nested(nn.Module):
    """Several inputs, one of them optional, and nested outputs; takes (batch, 6) each."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 4)
        self.right = nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(
        self, left: Tensor, right: Tensor, bonus: Tensor | None = None
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        a, b = self.left(left), self.right(right)
        if bonus is not None:
            a = a + bonus
        return {"logits": self.head(F.relu(a - b)), "boxes": (a, b)}


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (linear, (6,)),
    "linear_3d": (linear, (5, 6)),
    "conv_bn_relu": (conv_bn_relu, (2, 6, 6)),
    "depthwise": (depthwise, (4, 6, 6)),
    "residual_add": (ResidualAdd, (4, 6, 6)),
}
"""Name to the network's maker and the shape of one sample."""


def inputs_for(name: str, samples: int = 4) -> Tensor:
    """Random inputs of one of ``NETWORKS``."""
    return torch.randn(samples, *NETWORKS[name][1])


def shake_batchnorms(model: nn.Module) -> None:
    """Statistics and weights as after a long training, with negative gammas among them."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.weight[::2] *= -1
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr, operator]
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]


EVERY_LAYER = {
    "w4a8": Recipe(weight=WeightSpec(bits=4)),
    "w4a4": Recipe(weight=WeightSpec(bits=4), activation=ActivationSpec(bits=4)),
}
"""Presets of few bits without their exception for the first and the last layer: tiny networks have
few others."""

INPUTS_ONLY = Recipe(joins=False, outputs=False)
"""Quantizes the inputs of layers and nothing else."""


def trained(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    recipe: Recipe | str = "int8",
) -> nn.Module:
    """Prepare a model and calibrate it as training would; in eval mode."""
    prepare(model, recipe)
    shake_batchnorms(model)
    model.train()
    with torch.no_grad():
        for _ in range(2):
            call(model, inputs)
    return model.eval()


def call(model: Any, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> Any:
    """Call a model with what ``convert`` takes as ``example_inputs``."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs)
