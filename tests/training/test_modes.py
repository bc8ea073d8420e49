"""Ranges follow the batches that train the model, whatever the mode of the module around them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.quantizers.learned_weight import LearnedWeightQuantizer
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.phases import apply_phase, release_batchnorms
from lightning_qat.training.range_sync import activation_quantizers


class Backbone(nn.Module):
    """Two layers and a residual addition; neither batch norm nor dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return y + self.second(y)


class Tuned(nn.Module):
    """A backbone at the front, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(F.relu(self.backbone(x)))
        return result


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 4, generator=generator) * (1 if i == 0 else 4) for i in range(4)]


def ranges(model: nn.Module) -> dict[str, tuple[float, ...]]:
    quantizers = activation_quantizers(model).items()
    return {n: (float(q.min_val), float(q.max_val), float(q.batches)) for n, q in quantizers}


def trained(
    freeze: Callable[[Tuned], object], recipe: Any, example: Tensor | None
) -> dict[str, tuple[float, ...]]:
    torch.manual_seed(0)
    model = Tuned()
    freeze(model)
    prepare(model, recipe, example)
    for batch in batches():
        model(batch)
    return ranges(model)


RECIPES: dict[str, Any] = {
    "int8": "int8",
    "amct": "amct",
    "histogram": {"activation": {"calibration": "histogram"}},
    "w4a4": "w4a4",
}


# Learned activations are parameters: their plan is made before training.
PLANNED = [(name, plan) for name in RECIPES for plan in ("first forward", "example")]
PLANNED.remove(("w4a4", "first forward"))


@pytest.mark.parametrize(("name", "plan"), PLANNED)
def test_ranges_of_a_frozen_backbone_are_those_of_the_same_net_in_train_mode(
    name: str, plan: str
) -> None:
    recipe, example = RECIPES[name], torch.zeros(2, 4) if plan == "example" else None
    in_train_mode = trained(lambda model: model, recipe, example)
    # The backbone, one layer of it, and the head.
    for freeze in (
        lambda model: model.backbone.eval(),
        lambda model: model.backbone.second.eval(),
        lambda model: model.head.eval(),
    ):
        assert trained(freeze, recipe, example) == in_train_mode
    assert all(seen > 0 for *_, seen in in_train_mode.values())


def test_the_range_of_the_frozen_backbones_input_is_that_of_the_data() -> None:
    found = trained(lambda model: model.backbone.eval(), "int8", None)
    lows, highs = zip(*[(float(x.min()), float(x.max())) for x in batches()], strict=True)
    # The mean of the first batches, widened at once by a wider one.
    expected_low, expected_high = lows[0], highs[0]
    for count, (low, high) in enumerate(zip(lows[1:], highs[1:], strict=True), 2):
        expected_low = min(expected_low + (low - expected_low) / count, low)
        expected_high = max(expected_high + (high - expected_high) / count, high)
    low, high, _ = found["backbone.first.input_quantizer"]
    assert low == pytest.approx(expected_low, rel=1e-6)
    assert high == pytest.approx(expected_high, rel=1e-6)


def test_a_model_in_eval_mode_observes_nothing() -> None:
    model = Tuned()
    prepare(model, "int8", torch.zeros(2, 4))
    # A part in train mode, as for Monte-Carlo dropout, does not make it a training forward.
    model.eval().backbone.train()
    model(batches()[0])
    assert {n for *_, n in ranges(model).values()} == {0.0}


def test_a_part_that_is_called_alone_goes_by_its_own_mode() -> None:
    model = Tuned()
    prepare(model, "int8", torch.zeros(2, 4))
    model.backbone.eval()(batches()[0])
    assert {n for *_, n in ranges(model).values()} == {0.0}
    model.eval().backbone.train()(batches()[0])
    assert ranges(model)["backbone.first.input_quantizer"][2] == 1.0


def test_learned_scales_of_frozen_weights_start_with_the_training_of_the_model() -> None:
    model = Tuned()
    prepare(model, {"weight": {"quantizer": "learned"}}, torch.zeros(2, 4))
    model.backbone.eval()
    learned = [m for m in model.modules() if isinstance(m, LearnedWeightQuantizer)]
    assert len(learned) == 3
    model.eval()(batches()[0])
    assert not any(q.ready for q in learned)
    model.train().backbone.eval()
    model(batches()[0])
    assert all(q.ready for q in learned)


@pytest.mark.parametrize("own_mode", [True, False], ids=["train", "eval"])
def test_a_batch_norm_has_the_users_mode_again_after_it_was_held(own_mode: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3))
    prepare(model, {"joins": False, "outputs": False})
    model[1].train(own_mode)
    apply_phase(model, Phase("batchnorm_frozen", False, True, True))
    assert not model[1].training
    twin = copy.deepcopy(model)
    release_batchnorms(model)
    assert model[1].training is own_mode
    # A model that evaluates when it is released is not woken up.
    release_batchnorms(twin.eval())
    assert not twin[1].training
