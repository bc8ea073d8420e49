"""One module, or one function, that serves many layers: each of its calls has its own range."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.joins.apply import plan_of
from lightning_qat.training.range_sync import activation_quantizers


class Conv(nn.Module):
    """Ultralytics' block: one activation for all instances."""

    def __init__(self, factor: float, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(2, 2, 1), act
        with torch.no_grad():
            self.conv.weight.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.conv(x))
        return result


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return x


class Cell(nn.Module):
    """One step of a recurrence that somebody wrote by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(3, 3), nn.SiLU()

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        result: Tensor = self.act(self.layer(x) + h)
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            h = self.cell(step, h)
        return h


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Helper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return swish(self.b(swish(self.a(x))))


def joins(model: nn.Module, contains: str) -> dict[str, float]:
    quantizers = activation_quantizers(model).items()
    return {name: float(q.max_val) for name, q in quantizers if contains in name}


def blocks() -> nn.Module:
    act = nn.SiLU()
    return nn.Sequential(Conv(1, act), Conv(10, act), Conv(0.1, act))


def in_a_row() -> nn.Module:
    act = nn.SiLU()
    return nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3), act)


NETS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "ultralytics": (blocks, (4, 2, 3, 3), 3),
    "sequential": (in_a_row, (4, 3), 2),
    "loop": (Loop, (4, 3), 3),
}


@pytest.mark.parametrize("planned", [True, False], ids=["example inputs", "first forward"])
@pytest.mark.parametrize("name", NETS)
def test_each_call_of_a_shared_activation_has_its_own_range(name: str, planned: bool) -> None:
    make, shape, calls = NETS[name]
    model, x = make(), torch.randn(shape)
    inputs: dict[str, list[float]] = {"highs": []}
    prepare(model, "int8", x if planned else None)
    model(x)
    if not planned:
        model(x)
    found = joins(model, "silu")
    assert len(found) == calls
    assert len(set(found.values())) == calls
    # What each call reads, from hooks on the float layers' outputs in eval mode.
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [
        layer.register_forward_hook(lambda *a: inputs["highs"].append(float(a[2].detach().max())))
        for layer in layers
    ]
    model.eval()(x)
    for handle in handles:
        handle.remove()
    assert list(found.values()) == pytest.approx(inputs["highs"], rel=0.05, abs=0.02)


def test_a_step_of_a_recurrence_shares_its_ranges_over_time() -> None:
    model = Recurrent()
    prepare(model, "int8", torch.randn(2, 5, 3))
    assert list(joins(model, "silu")) == ["cell.act.qat_joins.silu_0_0"]
    # However long the sequence is; warnings are errors here.
    model(torch.randn(2, 9, 3))


def test_a_function_that_is_called_twice_has_ranges_for_each_call() -> None:
    model = Helper()
    prepare(model, "int8", torch.randn(2, 3))
    plan = plan_of(model)
    assert plan is not None
    assert [key for key in plan.sites[""] if key.startswith("sigmoid")] == [
        "sigmoid@swish[sigmoid#0]:0",
        "sigmoid@swish[sigmoid#0]:1",
    ]
    assert len(joins(model, "sigmoid")) == 2
