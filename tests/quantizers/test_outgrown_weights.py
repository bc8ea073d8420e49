"""Learned scales of weights widen at once where the weights have outgrown them."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback, Recipe, WeightSpec, prepare
from lightning_qat.numerics.kernels import loops as kernels
from lightning_qat.quantizers.factory import weight_quantizer
from lightning_qat.quantizers.learned_weight import LearnedWeightQuantizer
from lightning_qat.recipe.schedule import Schedule
from lightning_qat.training.learned_weights import follow_weights, learned_weights

WEIGHT = torch.tensor([[0.5, 1.0, 1.27], [0.25, -0.5, 1.27]])


def learning(weight: Tensor = WEIGHT, kind: str = "learned", **spec: Any) -> LearnedWeightQuantizer:
    """A quantizer that has started from the largest weights of the rows."""
    chosen: Any = kind
    made = weight_quantizer(WeightSpec(quantizer=chosen, initial="minmax", **spec), 0, len(weight))
    assert isinstance(made, LearnedWeightQuantizer)
    made.train()(weight)
    return made


def step(quantizer: LearnedWeightQuantizer) -> None:
    """What an optimizer does to the version of its parameter, and nothing to its numbers."""
    with torch.no_grad():
        quantizer.half_width.add_(0.0)


def outgrown() -> Tensor:
    """The second row's largest weight has doubled, and that of the first grown by a third step."""
    weight = WEIGHT.clone()
    weight[0, 2] += 0.003
    weight[1, 2] = -2.54
    return weight.requires_grad_()


def test_a_channel_gets_the_range_of_its_largest_weight_after_a_step() -> None:
    """1.27 / 127 = 0.01 and 2.54 / 127 = 0.02; nothing comes back through what is clipped."""
    quantizer, weight = learning(), outgrown()
    torch.testing.assert_close(quantizer.step(), torch.tensor([0.01, 0.01]))
    for scales, gradient in (([0.01, 0.01], 0.0), ([0.01, 0.02], 1.0)):
        weight.grad = None
        # Twice, as the graph of a layer that is called twice needs the same range.
        loss = quantizer(weight).sum() + quantizer(weight).sum()
        torch.testing.assert_close(quantizer.step().detach(), torch.tensor(scales))
        loss.backward()
        assert weight.grad is not None
        assert weight.grad[1, 2] == 2 * gradient
        assert weight.grad[0, 2] == 2.0, "Less than half a step outside is rounded, not clipped."
        step(quantizer)


@pytest.mark.parametrize(
    ("bits", "largest", "scale", "reason"),
    [
        (4, 1.3, 0.1, "(13 - 7)^2 is less than ((13 / 7)^2 - 1) * 256 / 12 = 52"),
        (4, 7.0, 1.0, "(70 - 7)^2 is more than ((70 / 7)^2 - 1) * 256 / 12 = 2112"),
        (8, 12.9, 12.9 / 127, "(129 - 127)^2 is more than ((129 / 127)^2 - 1) * 256 / 12 = 0.7"),
    ],
)
def test_few_integers_clip_where_wider_steps_would_round_the_rest_worse(
    bits: int, largest: float, scale: float, reason: str
) -> None:
    """256 weights, steps of 0.1."""
    weight = torch.zeros(1, 256)
    weight[0, 0] = largest
    quantizer = learning(weight, bits=bits)
    with torch.no_grad():
        quantizer.half_width.fill_(0.1 * quantizer.grid.half_count)
    quantizer(weight)
    torch.testing.assert_close(quantizer.step().detach(), torch.tensor([scale]), msg=reason)


@pytest.mark.parametrize(("largest", "scale"), [(-0.85, 0.1), (0.85, 0.85 / 7), (-0.95, 0.95 / 7)])
def test_the_grid_of_four_bits_reaches_a_step_further_down(largest: float, scale: float) -> None:
    """-8 to 7 in steps of 0.1; four weights."""
    weight = torch.tensor([[0.1, 0.2, -0.3, largest]])
    quantizer = learning(weight, bits=4)
    with torch.no_grad():
        quantizer.half_width.fill_(0.1 * quantizer.grid.half_count)
    quantizer(weight)
    torch.testing.assert_close(quantizer.step().detach(), torch.tensor([scale]))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_transposed_convolutions_of_groups_widen_their_own_channels(granularity: Any) -> None:
    spec = WeightSpec(quantizer="learned", granularity=granularity, initial="minmax")
    quantizer: Any = weight_quantizer(spec, 1, 4, groups=2).train()
    weight = torch.full((2, 2, 1, 1), 1.27)  # in, out / groups: channels 0, 1 and then 2, 3
    quantizer(weight)
    weight[1, 0] = 2.54
    step(quantizer)
    quantizer(weight)
    expected = [0.01, 0.01, 0.02, 0.01] if granularity == "per_channel" else 0.02
    torch.testing.assert_close(quantizer.step().detach(), torch.tensor(expected))


def test_amct_s_grid_widens_without_its_last_integer() -> None:
    """-128 would saturate where a batch norm with a negative factor is folded."""
    quantizer = learning(kind="ulq")
    step(quantizer)
    weight = outgrown().detach()
    integers = (quantizer(weight) / quantizer.step().detach()[:, None]).round()
    assert integers[1, 2] == -127


def test_scales_that_are_held_are_not_widened_nor_are_those_of_an_evaluation() -> None:
    held, evaluated = learning(), learning()
    held.requires_grad_(False)
    evaluated.eval()
    for quantizer in (held, evaluated):
        step(quantizer)
        quantizer(outgrown())
        torch.testing.assert_close(quantizer.step().detach(), torch.tensor([0.01, 0.01]))


def test_a_resumed_quantizer_goes_on_from_the_same_numbers() -> None:
    """Saved after the optimizer's step, before a forward has looked at it, and after one."""
    for looks_first in (False, True):
        quantizer, other, weight = learning(), learning(), outgrown()
        step(quantizer)
        if looks_first:
            quantizer(weight)
        other.load_state_dict(quantizer.state_dict())
        assert torch.equal(other(weight), quantizer(weight))
        assert torch.equal(other.step(), quantizer.step())


def test_weights_of_compiled_forwards_are_followed_by_whoever_steps() -> None:
    """Not one that is computed: spectral norm goes on with its estimate at every call."""
    model = nn.Sequential(nn.Linear(3, 2), nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)))
    recipe = Recipe(weight=WeightSpec(quantizer="learned"), joins=False, outputs=False)
    prepare(model, recipe)
    model(torch.randn(4, 3))
    estimate = [buffer.clone() for buffer in model[1].buffers()]
    before = model[0].weight_quantizer.step().detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0)
        model[0].weight.mul_(4.0)
    follow_weights(learned_weights(model))
    assert (model[0].weight_quantizer.step() > 2 * before).all()
    for buffer, old in zip(model[1].buffers(), estimate, strict=True):
        assert torch.equal(buffer, old)


class Operations(TorchDispatchMode):
    """Counts what would be a launch on a GPU: all but views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_further_weight_costs_a_few_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two ends and its share of the values; all else is done for a model's weights at once."""
    monkeypatch.setattr(kernels, "compiled_loops", lambda: None)

    def operations(layers: int) -> int:
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        prepare(model, Recipe(weight=WeightSpec(quantizer="learned"), joins=False, outputs=False))
        model(torch.randn(4, 8))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0)
            for layer in model:
                layer.weight.mul_(4.0)
        weights = learned_weights(model)
        with Operations() as counted:
            follow_weights(weights)
        assert counted.count > 0
        return counted.count

    assert (operations(12) - operations(4)) / 8 <= 3


class Regression(L.LightningModule):
    """Four of 64 weights in a row grow to a hundred times what they begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(64, 4)
        self.example_input_array = torch.zeros(1, 64)
        self.last = torch.tensor(torch.inf)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.line(x)
        return result

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.last = (self(batch[0]) - batch[1]).square().mean()
        return self.last

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_learns_weights_far_beyond_its_random_ones(compiled: bool, tmp_path: Any) -> None:
    """Float weights end at 0.1 % of the targets' variance, and with a lagging range at 1 %."""
    torch.manual_seed(0)
    model = Regression()
    slopes = torch.zeros(64, 4)
    slopes[:4] = torch.randn(4, 4) * 5
    x = torch.randn(512, 64)
    y = x @ slopes
    if compiled:
        torch._dynamo.reset()
        model.line.compile(backend="eager")
    recipe = Recipe(weight=WeightSpec(quantizer="learned"))
    trainer = L.Trainer(
        max_epochs=12,
        accelerator="cpu",
        callbacks=[QATCallback(recipe, Schedule(freeze_observers=None))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=32))
    assert model.last < 0.004 * y.square().mean()
