"""Specs and plans in a state_dict are tensors, which loops over a state_dict leave or copy."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_qat import convert, prepare
from lightning_qat.joins.apply import plan_of
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.prepare.prepare_like import prepare_like
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.stored_values import from_tensor, to_tensor
from tests.join_networks import NETWORKS, inputs_for, train_steps
from tests.joins.cases import calibrated

VALUES = {"bits": 8, "clip": (-0.1, 6.0), "name": "größe", "sites": {"b": 1, "a": [None, True]}}


def test_values_are_json_as_bytes_with_a_checksum_and_keep_their_order() -> None:
    stored = to_tensor(VALUES)
    assert (stored.dtype, stored.dim()) == (torch.uint8, 1)
    text = bytes(stored.tolist()).decode("ascii")
    assert list(json.loads(text)) == [*VALUES, "crc32"]
    assert from_tensor(stored, "key") == {**VALUES, "clip": [-0.1, 6.0]}
    assert from_tensor(VALUES, "key") == VALUES, "what earlier versions stored"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_a_cast_and_an_average_in_floating_point_lose_nothing(dtype: torch.dtype) -> None:
    stored = to_tensor({"bits": 4})
    average = 0.9999 * stored.to(dtype) + (1 - 0.9999) * stored.to(dtype)
    assert from_tensor(stored.to(dtype), "key") == from_tensor(average, "key") == {"bits": 4}


def averaged_and_cut_off(stored: Tensor) -> Tensor:
    return stored.clone().copy_(0.9 * stored + 0.1 * stored)


def summed_in_eight_bits(stored: Tensor) -> Tensor:
    return ((stored + stored + stored) / 3).to(torch.uint8)


@pytest.mark.parametrize(
    "change", [averaged_and_cut_off, summed_in_eight_bits, torch.zeros_like, lambda x: x[:-1]]
)
def test_what_an_average_has_changed_is_refused_with_the_remedy(change: Any) -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
    prepare(model, "int8", x)
    state = model.state_dict()
    for key in ("0.weight_quantizer._extra_state", "_qat_plan"):
        changed = {**state, key: change(state[key])}
        text = r"must hold its text \(JSON as bytes\) as it was saved.* leave tensors that are not"
        with pytest.raises((RuntimeError, ValueError), match=text):
            model.load_state_dict(changed)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_value_of_a_state_dict_is_a_tensor(network: str) -> None:
    model = calibrated(NETWORKS[network][0](), inputs_for(network))
    assert "_qat_plan" in model.state_dict()
    assert all(type(value) is Tensor for value in model.state_dict().values())


def test_what_is_taken_from_a_state_dict_is_the_takers_own() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    prepare(model, "int8", torch.randn(4, 3))
    for value in model.state_dict().values():
        if value.dtype == torch.uint8:
            value.zero_()
    model.load_state_dict(model.state_dict())


def ultralytics(ema: nn.Module, model: nn.Module) -> None:
    """The loop of ``ultralytics.utils.torch_utils.ModelEMA``."""
    other = model.state_dict()
    for key, value in ema.state_dict().items():
        if value.dtype.is_floating_point:
            value *= 0.5
            value += 0.5 * other[key].detach()


def timm(ema: nn.Module, model: nn.Module) -> None:
    """The loop of ``timm.utils.ModelEmaV2``, which asks for no dtype."""
    for mine, other in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(0.5 * mine + 0.5 * other)


def timm_v3(ema: nn.Module, model: nn.Module) -> None:
    """The loop of ``timm.utils.ModelEmaV3``."""
    for mine, other in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(other, weight=0.5)
        else:
            mine.copy_(other)


def of_the_state_dict_alone(ema: nn.Module, model: nn.Module) -> None:
    """Keeps tensors and no model, and averages them all."""
    mine, other = ({k: v.clone() for k, v in m.state_dict().items()} for m in (ema, model))
    ema.load_state_dict({key: 0.5 * mine[key] + 0.5 * other[key] for key in mine})


@pytest.mark.parametrize("update", [ultralytics, timm, timm_v3, of_the_state_dict_alone])
def test_an_average_of_state_dicts_averages_weights_and_ranges_alone(update: Any) -> None:
    x = inputs_for("resnet8")
    model = calibrated(NETWORKS["resnet8"][0](), x)
    ema = copy.deepcopy(model)
    train_steps(model, 2 * x, steps=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    before, plan = {k: v.clone() for k, v in ema.state_dict().items()}, plan_of(ema)
    update(ema, model)
    other = model.state_dict()
    keys = Counter(value.data_ptr() for value in ema.state_dict().values())
    for key, value in ema.state_dict().items():
        if value.is_floating_point():
            # A loop in place comes twice to the quantizer of two layers, as to a tied weight.
            kept = 0.5 if update is of_the_state_dict_alone else 0.5 ** keys[value.data_ptr()]
            expected = kept * before[key] + (1 - kept) * other[key]
            torch.testing.assert_close(value, expected, msg=key)
        elif value.dtype == torch.uint8:
            assert torch.equal(value, before[key])
    assert plan_of(ema) == plan
    fresh = NETWORKS["resnet8"][0]()
    prepare_like(fresh, ema.state_dict())
    fresh.load_state_dict(ema.state_dict())
    assert torch.equal(fresh.eval()(x), ema.eval()(x))


def first_range(model: nn.Module) -> float:
    return next(float(q.max_val) for q in model.modules() if isinstance(q, ActivationQuantizer))


def test_torchs_averaged_model_takes_buffers_too() -> None:
    x = inputs_for("resnet8")
    model = calibrated(NETWORKS["resnet8"][0](), x)
    ema = AveragedModel(model, use_buffers=True)
    seen = []
    for scale in (1.0, 2.0):
        train_steps(model, scale * x, steps=1)
        ema.update_parameters(model)
        seen.append(first_range(model))
    assert first_range(ema.module) == pytest.approx(sum(seen) / 2)
    assert all(isinstance(value, Tensor) for value in ema.state_dict().values())
    ema.load_state_dict(copy.deepcopy(ema.state_dict()))


def test_a_plan_of_another_length_loads() -> None:
    """As of the same network whose last call was planned otherwise."""
    x = inputs_for("resnet8")
    model = calibrated(NETWORKS["resnet8"][0](), x)
    state = model.state_dict()
    values = from_tensor(state["_qat_plan"], "_qat_plan")
    values["left_float"] = ["head:linear (a reason)"]
    longer = {**state, "_qat_plan": to_tensor(values)}
    assert longer["_qat_plan"].shape != state["_qat_plan"].shape
    model.load_state_dict(longer)
    plan = plan_of(model)
    assert plan is not None
    assert plan.left_float == ("head:linear (a reason)",)


def test_dicts_of_earlier_versions_load(tmp_path: Any) -> None:
    x = inputs_for("resnet8")
    model = calibrated(NETWORKS["resnet8"][0](), x)
    earlier: dict[str, Any] = {
        key: from_tensor(value, key) if value.dtype == torch.uint8 else value
        for key, value in model.state_dict().items()
    }
    plan = plan_of(model)
    assert plan is not None
    earlier["_qat_plan"] = plan.to_dict()
    torch.save(earlier, tmp_path / "earlier.pt")
    loaded = torch.load(tmp_path / "earlier.pt", weights_only=True)
    fresh = NETWORKS["resnet8"][0]()
    prepare_like(fresh, loaded)
    fresh.load_state_dict(loaded)
    assert torch.equal(fresh.eval()(x), model(x))
    assert isinstance(plan_of(fresh), JoinPlan)


def test_a_copy_that_is_averaged_in_place_has_the_ranges_that_came_with_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(16, 4)
    prepare(model, "int8", x)
    # Made before the first batch, as averages of weights are.
    average = copy.deepcopy(model)
    for _ in range(3):
        model(x)
    with torch.no_grad():
        for name, value in average.state_dict().items():
            value.copy_(model.state_dict()[name])
    assert torch.equal(average.eval()(x), model.eval()(x))
    assert torch.equal(convert(average, x)(x), model(x))
