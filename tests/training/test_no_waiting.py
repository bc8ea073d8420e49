"""No forward or backward waits for a device: on ``meta`` every look at a value is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.training.phases import set_observing
from lightning_qat.training.range_sync import activation_quantizers
from tests.join_networks import NETWORKS, inputs_for

RECIPES: dict[str, Any] = {
    "int8": "int8",
    "minmax": {"activation": {"calibration": "minmax"}},
    "16 bits": "a16w8",
    "learned": {"activation": {"quantizer": "learned"}, "weight": {"quantizer": "learned"}},
    "ulq": {"activation": {"quantizer": "ulq"}, "weight": {"quantizer": "ulq"}},
    "layers only": {"joins": False, "outputs": False},
}


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


@pytest.mark.parametrize("memory", ["fast", "compact"])
@pytest.mark.parametrize("recipe", RECIPES)
# Between them: depthwise convolutions, gates, sums, concatenations and a Linear.
@pytest.mark.parametrize("name", ["mobilenet_v3_block", "dense_block"])
def test_a_training_step_looks_at_no_value(name: str, recipe: str, memory: Any) -> None:
    model, x = NETWORKS[name][0](), inputs_for(name)
    prepare(model, RECIPES[recipe], x, memory)
    # The first batch starts learned scales; the next one quantizes.
    step(model.train(), x)
    model.to("meta")
    for observing in (True, False):
        set_observing(activation_quantizers(model).values(), observing)
        step(model, x.to("meta"))


def test_a_look_at_a_value_would_be_seen() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros((), device="meta").item()


@pytest.mark.cuda
@pytest.mark.parametrize("memory", ["fast", "compact"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["mobilenet_v3_block", "dense_block"])
def test_a_training_step_on_a_gpu_waits_for_nothing(name: str, recipe: str, memory: Any) -> None:
    model, x = NETWORKS[name][0]().to("cuda"), inputs_for(name).to("cuda")
    prepare(model, RECIPES[recipe], x, memory)
    step(model.train(), x)
    for quantizer in activation_quantizers(model).values():
        quantizer.deferred = True
    for observing in (True, False):
        set_observing(activation_quantizers(model).values(), observing)
        step(model, x)  # kernels are compiled
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(model, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_a_wait_on_a_gpu_would_be_seen() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.zeros((), device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
