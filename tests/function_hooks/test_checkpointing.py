"""Activation checkpointing changes nothing: losses, gradients and ranges are equal to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.phases import apply_phase
from lightning_qat.training.range_sync import activation_quantizers, commit_ranges

Run = Callable[..., Any]
"""Calls a function with its arguments, checkpointed or not."""

REENTRANT = [False, True]

# torch says so of a reentrant checkpoint within another.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class BasicBlock(nn.Module):
    """Two convolutions and the tensor that it is given, behind a relu outside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))) + x)


class ResNet(nn.Module):
    """A stem with a relu, and checkpointed stages; the first block's input has another reader."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.stem, self.side = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.stage1, self.stage2 = BasicBlock(), nn.Sequential(BasicBlock(), BasicBlock())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        side = self.side(x)
        x = self.run(self.stage1, x)
        # A stage within a stage.
        x = self.run(lambda x: self.stage2[1](self.run(self.stage2[0], x)), x)
        logits: Tensor = self.head((x + side).mean((2, 3)))
        return logits


class DenseNet(nn.Module):
    """Checkpoints functions of its own, whose calls belong to no submodule."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.stem, self.conv1, self.conv2 = (
            nn.Conv2d(given, 4, 3, padding=1) for given in (3, 4, 8)
        )
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [F.relu(self.stem(x))]
        for conv in (self.conv1, self.conv2):
            features.append(
                self.run(lambda *xs, conv=conv: F.relu(conv(torch.cat(xs, 1))) * 2, *features)
            )
        logits: Tensor = self.head(self.run(lambda *xs: torch.cat(xs, 1), *features).mean((2, 3)))
        return logits


class LateDenseNet(DenseNet):
    """Begins to checkpoint in the middle of training."""

    def __init__(self, run: Run) -> None:
        super().__init__(lambda function, *args: function(*args))
        self.later, self.forwards = run, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if self.forwards == 4:
            self.run = self.later
        return super().forward(x)


def trained(
    kind: type[nn.Module], run: Run, recipe: str = "int8", memory: Any = "fast"
) -> tuple[list[Tensor], list[Tensor], list[tuple[float, float]]]:
    """Losses, last gradients and ranges of a few steps."""
    torch.manual_seed(0)
    model = kind(run)
    data = torch.randn(6, 4, 3, 6, 6)
    prepare(model, recipe, example_inputs=data[0], memory=memory)
    # One range for the whole step, as QATCallback has it.
    apply_phase(model, Phase("quantize", observing=True, quantizing=True, batchnorm_frozen=False))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for x in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(4) % 3)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        commit_ranges(model)
        losses.append(loss.detach())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    quantizers = activation_quantizers(model).values()
    return losses, gradients, [(float(q.min_val), float(q.max_val)) for q in quantizers]


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("memory", ["fast", "compact"])
@pytest.mark.parametrize("recipe", ["int8", "w4a4", "amct"])
@pytest.mark.parametrize("kind", [ResNet, DenseNet, LateDenseNet])
def test_checkpointing_changes_no_loss_no_gradient_and_no_range(
    kind: type[nn.Module], recipe: str, memory: str, reentrant: bool
) -> None:
    plain = trained(kind, lambda function, *args: function(*args), recipe, memory)
    checkpointed = trained(
        kind,
        lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant),
        recipe,
        memory,
    )
    assert all(map(torch.equal, plain[0], checkpointed[0]))
    assert plain[2] == checkpointed[2]
    for one, other in zip(plain[1], checkpointed[1], strict=True):
        # Two branches' gradients meet in another order.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_a_module_that_is_checkpointed_twice_keeps_the_quantizers_of_each_run(
    reentrant: bool,
) -> None:
    class Twice(nn.Module):
        """Its outputs are those of one head that runs twice; each run has a range."""

        def __init__(self, run: Run) -> None:
            super().__init__()
            self.run, self.stem, self.head = run, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            both = self.run(self.head, x), self.run(self.head, x * 50)
            return torch.cat([y.mean((2, 3)) for y in both], 1)[:, :3]

    plain = trained(Twice, lambda function, *args: function(*args))
    checkpointed = trained(
        Twice, lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant)
    )
    assert all(map(torch.equal, plain[0], checkpointed[0]))
    assert plain[2] == checkpointed[2]


def test_a_branch_without_gradient_does_not_take_the_gradient_of_the_others() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.frozen, self.head = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            with torch.no_grad():
                target = self.frozen(x)
            logits: Tensor = self.head(x) - target
            return logits

    model = TwoHeads()
    prepare(model, example_inputs=torch.zeros(2, 4))
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        assert model.stem.weight.grad is not None
        assert float(model.stem.weight.grad.abs().sum()) > 0
