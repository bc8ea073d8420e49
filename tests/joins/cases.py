"""Networks and measures that the tests of joins share."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.joins.apply import plan_of
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from tests.join_networks import FULL, NETWORKS, inputs_for, train_steps


@functools.cache
def converted(network: str) -> QuantizedModel:
    """A network after three real training steps, the same one for every test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = inputs_for(network, 8)
        model = (NETWORKS | FULL)[network][0]()
        prepare(model, "int8", x)
        return convert(train_steps(model, x), x)


def calibrated(model: nn.Module, *inputs: Any, recipe: Recipe | str = "int8") -> nn.Module:
    """Prepare a model and show it two batches, of which the first one makes the plan."""
    prepare(model, recipe)
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(*inputs)
    return model.eval()


def the_plan(model: nn.Module) -> JoinPlan:
    plan = plan_of(model)
    assert plan is not None
    return plan


def serving(model: nn.Module, path: str, function: str, operand: int = 0, call: int = 0) -> Any:
    """The quantizer of one operand of one call."""
    place = f"{path}.{function}:{call}[{operand}]".lstrip(".")
    [tensor] = [t for t in the_plan(model).tensors if place in t.consumers]
    return model.get_submodule(tensor.quantizer)


class AddsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y += x
        return self.two(y)


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))) + x)


@dataclass
class Registered:
    logits: Tensor


torch.export.register_dataclass(Registered)
