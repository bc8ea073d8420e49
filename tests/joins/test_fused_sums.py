"""``joins="fused_sums"``: of a residual addition the shortcut alone is quantized."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.joins.apply import plan_of
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe

RECIPE = Recipe(joins="fused_sums")


class Block(nn.Module):
    """torchvision's ``BasicBlock``: the 1x1 convolution of the shortcut runs last."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def plan(model: nn.Module, x: Tensor, recipe: Recipe = RECIPE) -> JoinPlan:
    found = prepare(model, recipe, x).joins
    assert found is not None
    return found


def sums(found: JoinPlan) -> dict[str, dict[str, str]]:
    """Module to the quantizers of its sum's operands."""
    return {
        module: dict(operands)
        for module, calls in found.sites.items()
        for call, operands in calls.items()
        if call.startswith("add@")
    }


def test_the_shortcut_of_a_residual_block_is_quantized_and_the_convolution_is_not() -> None:
    model = nn.Sequential(Block(4, 4), Block(4, 8, stride=2))
    found = plan(model, torch.randn(2, 4, 8, 8))
    # Of two convolutions the shortcut is the one behind fewer layers, although it runs last.
    assert sums(found) == {
        "0": {"1": "0.conv1.input_quantizer"},
        "1": {"1": "1.qat_joins.add_0_1"},
    }
    assert found.left_float == (
        "0.add:0[0]: 0.conv2 adds the other operand in its kernel (joins='fused_sums')",
        "1.add:0[0]: 1.conv2 adds the other operand in its kernel (joins='fused_sums')",
    )
    everything = plan(
        nn.Sequential(Block(4, 4), Block(4, 8, stride=2)), torch.randn(2, 4, 8, 8), Recipe()
    )
    # Nothing else differs.
    left_out = {"0.qat_joins.add_0_0", "1.qat_joins.add_0_0"}
    quantizers = {tensor.quantizer for tensor in everything.tensors}
    assert quantizers - {tensor.quantizer for tensor in found.tensors} == left_out


def test_training_rounds_the_shortcut_alone() -> None:
    model: Any = Block(4, 4)
    x = torch.randn(8, 4, 6, 6)
    plan(model, x, Recipe(joins="fused_sums", outputs=False))
    model.train()
    with torch.no_grad():
        model(x)
        model.eval()
        branch = model.bn2(model.conv2(model.relu(model.bn1(model.conv1(x)))))
        rounded = model.conv1.input_quantizer(x)
        assert not torch.equal(rounded, x)
        assert torch.equal(model(x), F.relu(branch + rounded))


class RepVGG(nn.Module):
    """Two convolutions side by side and a batch norm; the sum of three."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.wide(x) + self.narrow(x) + self.norm(x))


def test_of_two_convolutions_as_deep_the_first_is_the_shortcut() -> None:
    found = plan(RepVGG(), torch.randn(2, 4, 6, 6))
    first, second = (
        dict(operands) for call, operands in found.sites[""].items() if call.startswith("add@")
    )
    assert first == {"0": "qat_joins.add_0_0"}
    assert second == {"0": "qat_joins.add_1_0", "1": "qat_joins.add_1_1"}


class Sum(nn.Module):
    """A convolution's output and something else."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.place = nn.Parameter(torch.randn(1, 4, 6, 6))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self, x))


@pytest.mark.parametrize(
    ("forward", "quantized"),
    [
        pytest.param(lambda m, x: x + m.conv(x), ["0"], id="the other way round"),
        pytest.param(lambda m, x: torch.add(m.conv(x), x), ["1"], id="torch.add"),
        pytest.param(lambda m, x: m.drop(m.conv(x)) + x, ["1"], id="dropout"),
        pytest.param(lambda m, x: m.fc(x) + x, ["0", "1"], id="linear"),
        pytest.param(lambda m, x: F.relu(m.conv(x)) + x, ["0", "1"], id="behind relu"),
        pytest.param(lambda m, x: torch.add(m.conv(x), x, alpha=2), ["0", "1"], id="alpha"),
        pytest.param(lambda m, x: m.conv(x) + x[:, :, :1], ["0", "1"], id="broadcast"),
        pytest.param(lambda m, x: ((y := m.conv(x)) + x) - y, ["0", "1"], id="read elsewhere"),
        pytest.param(lambda m, x: (y := m.conv(x)) + y, ["0", "1"], id="twice itself"),
        pytest.param(lambda m, x: m.conv(x) - x, None, id="difference"),
    ],
)
def test_only_sums_that_a_convolutions_kernel_adds_lose_an_operand(
    forward: Callable[[Any, Tensor], Tensor], quantized: list[str] | None
) -> None:
    found = plan(Sum(forward), torch.randn(2, 4, 6, 6))
    calls = [o for call, o in found.sites[""].items() if call.startswith(("add@", "sub@"))]
    assert [*calls[0]] == (quantized or ["0", "1"])
    assert len(found.left_float) == (quantized is not None and len(quantized) == 1)


def test_a_parameter_that_is_added_is_no_shortcut() -> None:
    plain, fused = (
        plan(Sum(lambda m, x: m.conv(x) + m.place), torch.randn(2, 4, 6, 6), recipe).sites
        for recipe in (Recipe(), RECIPE)
    )
    assert fused == plain


class Add(nn.Module):
    """As torch's ``FloatFunctional``."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Shared(nn.Module):
    """One module adds twice: behind a convolution, and behind none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.add = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(self.conv(x), x)
        return self.head(self.add(F.relu(x), torch.tanh(x)))


def test_a_shared_module_loses_the_operand_only_where_a_convolution_gives_it() -> None:
    found = plan(Shared(), torch.randn(2, 4, 6, 6))
    assert sorted(map(len, found.sites["add"].values())) == [1, 2]


def test_the_first_batch_plans_the_same() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    early, late = Block(4, 8, stride=2), Block(4, 8, stride=2)
    found = plan(early, x)
    prepare(late, RECIPE)
    late.train()(x)
    assert plan_of(late) == found


def test_a_file_says_fused_sums() -> None:
    recipe = Recipe.from_dict({"preset": "int8", "joins": "fused_sums"})
    assert recipe == RECIPE
    assert Recipe.from_dict(recipe.to_dict()) == RECIPE
    with pytest.raises(ValueError, match=r"joins must be true, false or 'fused_sums'; got 'sums'"):
        Recipe(joins="sums")  # type: ignore[arg-type]
