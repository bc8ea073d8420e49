"""How many launches quantization adds to a step on a GPU, counted without one.

A launch takes about as long as a small tensor's pass, so their number decides what small layers
cost: the float network has two or three launches per layer and direction.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.launches import LEARNED, Calls, added_launches, step
from benchmarks.nets import Encoder, mobilenet, resnet18
from lightning_qat import prepare
from lightning_qat.numerics.gpu import activations as gpu
from lightning_qat.numerics.gpu import straight_through
from lightning_qat.numerics.gpu.launch import count_launches
from lightning_qat.quantizers.switches import switch
from lightning_qat.training.range_sync import RangeCommits, activation_quantizers
from tests.models import EVERY_LAYER

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: resnet18(8),
    "mobilenet": lambda: mobilenet(),
    "encoder": lambda: Encoder(),
}
ULQ = {"activation": {"quantizer": "ulq"}, "weight": {"quantizer": "ulq"}}


def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 32, 32)


def two_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize("observing", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_one_launch_per_activation_and_direction(net: str, observing: bool) -> None:
    """A constant for all weights together; a relu and its quantizer are one launch, not two."""
    added = added_launches(NETS[net], images(), "int8", observing=observing)
    assert added.forward <= added.activations + 8
    assert added.backward <= added.activations
    kernels = Counter(launch.kernel for launch in added.kernels)
    assert kernels["weight_ranges"] == kernels["quantize_weights"] == 1
    assert kernels["fake_quantize"] == added.activations
    assert kernels["masked"] <= added.activations


@pytest.mark.parametrize("recipe", [LEARNED, ULQ], ids=["LSQ", "ULQ"])
@pytest.mark.parametrize("net", NETS)
def test_two_launches_per_learned_grid_and_direction(net: str, recipe: Any) -> None:
    added = added_launches(NETS[net], images(), recipe)
    grids = added.activations + added.weights
    assert added.forward <= 2 * grids
    assert added.backward <= 2 * grids
    kernels = Counter(launch.kernel for launch in added.kernels)
    assert kernels["fake_quantize"] == kernels["learned_backward"] == grids


def test_compact_backward_restores_with_one_launch_more() -> None:
    added = added_launches(NETS["resnet18"], images(), "int8", compact=True)
    assert added.forward <= added.activations + 8
    assert added.backward <= 2 * (added.activations + added.weights)


@pytest.mark.parametrize("net", NETS)
def test_kernels_move_hardly_more_than_they_must(net: str, monkeypatch: Any) -> None:
    """The floor: each tensor read and written once per direction, each weight once in all."""
    elements: list[int] = []
    quantize = gpu.fake_quantize

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        elements.append(x.numel())
        return quantize(x, *args, **kwargs)

    monkeypatch.setattr(straight_through, "fake_quantize", counted)
    added = added_launches(NETS[net], images(), "int8", observing=True)
    moved = sum(launch.read + launch.written for launch in added.kernels)
    # The last of four steps.
    activations = sum(elements[-added.activations :])
    of_forward = 2 * 4 * activations
    of_backward = sum(2 * launch.written for launch in added.kernels if launch.kernel == "masked")
    weights = sum(
        2 * launch.written for launch in added.kernels if launch.kernel == "quantize_weights"
    )
    assert len(elements) // 4 == added.activations
    assert moved <= 1.1 * (of_forward + of_backward + weights)


@pytest.mark.parametrize("observing", [True, False])
@pytest.mark.parametrize("recipe", ["int8", EVERY_LAYER["w4a4"]], ids=["int8", "w4a4"])
def test_the_way_without_kernels(recipe: Any, observing: bool) -> None:
    """Five operations forward and one backward per activation, five per weight, five in all.

    Observing adds four per activation.
    """
    added = added_launches(two_convolutions, images(), recipe, triton=False, observing=observing)
    per_activation = 9 if observing else 5
    assert added.forward <= per_activation * added.activations + 5 * added.weights + 5
    assert added.backward <= added.activations
    assert not added.kernels


class Concatenation(nn.Module):
    """Two convolutions side by side, and one that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.head = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.cat([self.left(x), self.right(x)], 1))
        return y


def test_inputs_of_a_concatenation_are_observed_in_the_pass_that_quantizes_them() -> None:
    """They share a range: the widest one, which takes an operation more."""
    observing = added_launches(Concatenation, images(), "int8", observing=True)
    frozen = added_launches(Concatenation, images(), "int8")
    assert "value_range" not in {launch.kernel for launch in observing.kernels}
    assert observing.forward <= frozen.forward + 2


def test_a_frozen_range_computes_no_scale() -> None:
    """Without kernels either: what a step adds is rounding, and nothing that is one number."""
    model, x = two_convolutions().train(), images()
    prepare(model, "int8", x)
    model(x)
    switch(model, deferred=True, observing=False)
    model.to("meta")
    on_meta = x.to("meta")
    for _ in range(2):
        step(model, on_meta, triton=False)
    with Calls() as calls:
        model(on_meta)
    # Of the weights, whose ranges follow them: once for both together.
    assert calls.names["masked_fill_"] == 1
    assert calls.names["div"] == 3 + 2 + 1


def test_a_commit_is_as_many_launches_in_a_deeper_network() -> None:
    def launches_of(depth: int) -> tuple[int, int]:
        layers: list[nn.Module] = [nn.Linear(8, 8) for _ in range(depth)]
        model, x = nn.Sequential(*layers).train(), torch.randn(4, 8)
        prepare(model, "int8", x)
        model(x)
        switch(model, deferred=True)
        quantizers = activation_quantizers(model)
        model.to("meta")
        with count_launches():
            model(x.to("meta"))
            with Calls() as calls:
                RangeCommits().commit(quantizers)
        assert all(quantizer.pending is None for quantizer in quantizers.values())
        return len(quantizers), calls.total

    (few, shallow), (many, deep) = launches_of(2), launches_of(12)
    assert many > few
    assert shallow == deep <= 30


def test_a_model_that_moves_is_quantized_where_it_is() -> None:
    """The table of weights holds addresses: another device, another table."""
    model, x = two_convolutions().train(), images()
    prepare(model, "int8", x)
    model(x)
    twin = copy.deepcopy(model)
    with count_launches() as launches:
        model.to("meta")
        for _ in range(3):
            model(x.to("meta"))
        model.to_empty(device="cpu")
        model.load_state_dict(twin.state_dict())
        assert torch.equal(model.eval()(x), twin.eval()(x))
    assert {launch.kernel for launch in launches} >= {"quantize_weights"}
