"""Activation and weight quantizers: their state, and when they act."""

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_qat.numerics.fake_quantize import fake_quantize
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.factory import activation_quantizer
from lightning_qat.quantizers.final import FinalActivation, FinalWeight
from lightning_qat.quantizers.stored_values import from_tensor
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec


def calibrated(spec: ActivationSpec | None = None, low: float = -1.0, high: float = 1.55) -> Any:
    quantizer = ActivationQuantizer(spec or ActivationSpec())
    quantizer(torch.tensor([low, high]))
    return quantizer


def state(quantizer: ActivationQuantizer) -> tuple[float, float, float]:
    return quantizer.min_val.item(), quantizer.max_val.item(), quantizer.batches.item()


# When an activation quantizer observes and quantizes


def test_passes_its_input_through_until_a_range_is_known() -> None:
    quantizer, x = ActivationQuantizer(ActivationSpec()).eval(), torch.randn(4)
    assert quantizer(x) is x
    quantizer.train().deferred = True
    assert quantizer(x) is x
    assert not quantizer.calibrated


def test_immediate_quantizes_the_very_batch_that_gave_the_range() -> None:
    quantizer, x = ActivationQuantizer(ActivationSpec()), torch.tensor([-1.0, 0.004, 1.55])
    y = quantizer(x)
    assert state(quantizer) == (-1.0, torch.tensor(1.55).item(), 1.0)
    expected = torch.fake_quantize_per_tensor_affine(x, 0.01, -28, -128, 127)
    # The scale is (1.55 + 1) / 255 in float32, an ulp from 0.01 at most, times up to 155 steps.
    torch.testing.assert_close(y, expected, rtol=3e-7, atol=0)


def test_deferred_observations_wait_for_commit_and_grow_meanwhile() -> None:
    quantizer = ActivationQuantizer(ActivationSpec())
    quantizer.deferred = True
    quantizer(torch.tensor([-1.0, 2.0]))
    quantizer(torch.tensor([-3.0, 0.0]))
    assert state(quantizer) == (0.0, 0.0, 0.0)
    assert quantizer.pending is not None
    assert quantizer.pending.tolist() == [3.0, 2.0]
    quantizer.commit(quantizer.pending)
    assert state(quantizer) == (-3.0, 2.0, 1.0)
    assert quantizer.pending is None
    assert quantizer.calibrated


def test_never_observes_in_eval_mode() -> None:
    quantizer = calibrated().eval()
    before = state(quantizer)
    quantizer(torch.tensor([-100.0, 100.0]))
    assert state(quantizer) == before
    assert quantizer.pending is None


def test_never_observes_when_told_not_to() -> None:
    quantizer = calibrated()
    quantizer.observing = False
    before = state(quantizer)
    quantizer(torch.tensor([-100.0, 100.0]))
    assert state(quantizer) == before


def test_observes_without_quantizing_when_told_to() -> None:
    quantizer, x = calibrated(), torch.tensor([-100.0, 0.123])
    quantizer.quantizing = False
    assert quantizer(x) is x
    assert quantizer.batches == 2


@pytest.mark.parametrize(
    "calibration", ["moving_average", "minmax", "percentile", "mse", "entropy", "histogram"]
)
@pytest.mark.parametrize("kind", ["observed", "learned", "ulq"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_constant_activation_is_kept_to_half_a_step(
    value: float, symmetric: bool, kind: Any, calibration: Any
) -> None:
    spec = ActivationSpec(symmetric=symmetric, quantizer=kind, calibration=calibration)
    quantizer = activation_quantizer(spec)
    x = torch.full((2, 5), value, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    difference = float((y - x).detach().abs().max())
    scale = float(quantizer.qparams().scale)
    # A histogram's ends are those of its bins: reach 4, of which 3 is a bin's lower edge.
    expected = {0.0: 1.0}.get(value, abs(value) / (127 if symmetric else 255))
    assert scale == pytest.approx(expected, rel=1 / 1024)
    assert difference <= scale / 2
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert all(bool(torch.isfinite(p.grad)) for p in quantizer.parameters() if p.grad is not None)


def test_an_empty_batch_changes_no_range() -> None:
    fresh = ActivationQuantizer(ActivationSpec())
    fresh(torch.empty(0, 3))
    assert not fresh.calibrated
    quantizer = calibrated()
    before = state(quantizer)
    assert quantizer(torch.empty(0, 3)).shape == (0, 3)
    assert state(quantizer) == before


def test_a_clip_is_the_range_from_the_start_and_never_observed() -> None:
    quantizer = ActivationQuantizer(ActivationSpec(clip=(-1.0, 2.0), bits=2))
    y = quantizer(torch.tensor([-9.0, -1.0, 0.4, 0.6, 2.0, 9.0]))
    assert y.tolist() == [-1.0, -1.0, 0.0, 1.0, 2.0, 2.0]
    assert state(quantizer) == (-1.0, 2.0, 0.0)


@pytest.mark.parametrize(
    ("spec", "scale", "zero_point", "grid"),
    [
        (ActivationSpec(), 2.55 / 255, -28, (-128, 127)),
        (ActivationSpec(symmetric=True), 1.55 / 127, 0, (-128, 127)),
        (ActivationSpec(fixed_min=True), 1.55 / 255, -128, (-128, 127)),
        (ActivationSpec(fixed_min=False), 2.55 / 255, -28, (-128, 127)),
        (ActivationSpec(bits=4), 2.55 / 15, -2, (-8, 7)),
        (ActivationSpec(bits=4, symmetric=True), 1.55 / 7, 0, (-8, 7)),
        (ActivationSpec(bits=2), 2.55 / 3, -1, (-2, 1)),
        (ActivationSpec(bits=16, symmetric=True), 1.55 / 32767, 0, (-32768, 32767)),
    ],
)
def test_the_numbers_of_the_range_from_minus_1_to_1_55(
    spec: ActivationSpec, scale: float, zero_point: int, grid: tuple[int, int]
) -> None:
    qparams = calibrated(spec).qparams()
    # 1.55 in float32, a sum and a division: three roundings.
    torch.testing.assert_close(qparams.scale, torch.tensor(scale), rtol=3 * 2.0**-24, atol=0)
    assert qparams.zero_point.item() == zero_point
    assert (qparams.grid.qmin, qparams.grid.qmax) == grid
    assert qparams.axis is None


def test_qparams_without_a_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="no training batch has passed through it"):
        ActivationQuantizer(ActivationSpec()).qparams()


def test_the_gradient_is_zero_outside_the_range() -> None:
    quantizer = calibrated().eval()
    x = torch.tensor([-1.1, -0.9, 1.5, 1.7], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


# State


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_buffers_stay_float32_with_their_exact_values(cast: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), calibrated(low=-1 / 3, high=2 / 3))
    before = {k: v.clone() for k, v in model[1].named_buffers()}
    getattr(model, cast)()
    assert model[0].weight.dtype is not torch.float32
    for name, buffer in model[1].named_buffers():
        assert buffer.dtype is torch.float32
        assert torch.equal(buffer, before[name])


def test_to_a_dtype_keeps_float32_and_to_a_device_moves() -> None:
    quantizer = calibrated().to(torch.bfloat16)
    assert quantizer.min_val.dtype is torch.float32
    quantizer.to("meta", torch.float16)
    assert quantizer.min_val.device.type == "meta"
    assert quantizer.min_val.dtype is torch.float32


def test_the_state_dict_holds_range_and_spec_and_nothing_else() -> None:
    assert set(calibrated().state_dict()) == {"min_val", "max_val", "batches", "_extra_state"}
    assert set(WeightQuantizer(WeightSpec(), 0).state_dict()) == {"_extra_state"}


def test_a_state_dict_round_trip_gives_the_same_quantizer() -> None:
    spec = ActivationSpec(bits=6)
    source, target = calibrated(spec), ActivationQuantizer(spec)
    target.pending = torch.tensor([9.0, 9.0])
    target.load_state_dict(source.state_dict())
    assert state(target) == state(source)
    assert target.calibrated
    assert target.pending is None
    assert target.qparams().equal(source.qparams())


def test_an_uncalibrated_state_makes_a_calibrated_quantizer_pass_through_again() -> None:
    quantizer = calibrated()
    quantizer.load_state_dict(ActivationQuantizer(ActivationSpec()).state_dict())
    x = torch.randn(3)
    assert quantizer.eval()(x) is x


def test_a_weights_only_checkpoint_holds_everything(tmp_path: Any) -> None:
    spec = ActivationSpec(clip=(-1.0, 3.0))
    torch.save(ActivationQuantizer(spec).state_dict(), tmp_path / "q.pt")
    loaded = torch.load(tmp_path / "q.pt", weights_only=True)
    ActivationQuantizer(spec).load_state_dict(loaded)
    assert from_tensor(loaded["_extra_state"], "")["clip"] == [-1.0, 3.0]


def test_a_clip_that_was_stored_as_a_list_is_the_same_clip() -> None:
    spec = ActivationSpec(clip=(-1.0, 3.0))
    values = ActivationQuantizer(spec).state_dict()
    for clip in ([-1.0, 3.0], (-1.0, 3.0)):
        earlier = {**from_tensor(values["_extra_state"], ""), "clip": clip}
        ActivationQuantizer(spec).load_state_dict({**values, "_extra_state": earlier})
    ActivationQuantizer(spec).load_state_dict(values)


def test_samples_travel_with_the_state_and_older_states_have_none() -> None:
    spec = ActivationSpec(samples=4096)
    values = calibrated(spec).state_dict()
    earlier = from_tensor(values["_extra_state"], "")
    assert earlier["samples"] == 4096
    ActivationQuantizer(spec).load_state_dict(values)
    with pytest.raises(RuntimeError, match="samples: checkpoint 4096, model None"):
        ActivationQuantizer(ActivationSpec()).load_state_dict(values)
    del earlier["samples"]
    values["_extra_state"] = earlier
    ActivationQuantizer(ActivationSpec()).load_state_dict(values)
    with pytest.raises(RuntimeError, match="samples: checkpoint None, model 4096"):
        ActivationQuantizer(spec).load_state_dict(values)


def test_a_sampled_range_is_what_is_in_the_sample() -> None:
    x = torch.zeros(2**16)
    x[100] = torch.nan  # between the first run of 64 and the next
    quantizer = ActivationQuantizer(ActivationSpec(samples=4096)).train()
    quantizer(x)
    assert quantizer.why_not_final is None
    whole = ActivationQuantizer(ActivationSpec()).train()
    whole(x)
    assert "not finite" in str(whole.why_not_final)


CALIBRATIONS: dict[str, dict[str, Any]] = {
    "moving_average": {},
    "minmax": {"calibration": "minmax"},
    "percentile": {"calibration": "percentile"},
    "mse": {"calibration": "mse"},
    "histogram": {"calibration": "histogram"},
    "a sample": {"samples": 1024},
}


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("saves_input", [False, True])
def test_a_calibrated_range_goes_on_seeing_what_its_calibration_asks_for(
    calibration: str, deferred: bool, saves_input: bool
) -> None:
    """Found in the pass that quantizes where it can be; used at once where it is not deferred."""
    torch.manual_seed(0)
    spec = ActivationSpec(**CALIBRATIONS[calibration])
    quantizer = ActivationQuantizer(spec).train()
    quantizer(torch.randn(20_000))
    quantizer.deferred = deferred
    twin, x = copy.deepcopy(quantizer), torch.randn(20_000, requires_grad=True) * 3
    before = quantizer._current_qparams()
    y = quantizer(x, saves_input=saves_input)
    seen = twin.range_of(x)
    twin.commit(seen)
    numbers = before if deferred else twin._current_qparams()
    assert torch.equal(y, fake_quantize(x, *numbers, quantizer.grid))
    if deferred:
        assert quantizer.pending is not None
        assert torch.equal(quantizer.pending, seen)
    else:
        assert state(quantizer) == state(twin)


def test_the_state_of_another_spec_is_refused_and_every_key_named() -> None:
    model = nn.ModuleDict({"input": ActivationQuantizer(ActivationSpec(bits=8))})
    other = nn.ModuleDict({"input": calibrated(ActivationSpec(bits=4, symmetric=True))})
    with pytest.raises(
        RuntimeError,
        match=re.escape(
            "input: The checkpoint's ActivationSpec differs from the model's: "
            "bits: checkpoint 4, model 8; symmetric: checkpoint True, model False. "
            "Use the recipe the checkpoint was trained with."
        ),
    ):
        model.load_state_dict(other.state_dict())


def test_every_quantizer_of_another_spec_is_named_at_once() -> None:
    def model(bits: int) -> nn.Module:
        return nn.Sequential(*(WeightQuantizer(WeightSpec(bits), 0) for _ in range(2)))

    with pytest.raises(RuntimeError, match=r"(?s)0: The checkpoint's.*1: The checkpoint's"):
        model(8).load_state_dict(model(4).state_dict())


def test_a_float_checkpoint_loads_and_leaves_the_range_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), calibrated())
    before = state(model[1])
    result = model.load_state_dict(
        {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, strict=True
    )
    assert not result.missing_keys
    assert state(model[1]) == before
    assert model[1].calibrated


@pytest.mark.parametrize("missing", ["min_val", "max_val", "batches", "_extra_state"])
def test_a_checkpoint_with_some_of_the_keys_must_have_all(missing: str) -> None:
    values = calibrated().state_dict()
    del values[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        ActivationQuantizer(ActivationSpec()).load_state_dict(values)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies_and_pickles_are_independent_and_alike(copier: Any) -> None:
    quantizer = calibrated()
    twin = copier(quantizer)
    assert twin.qparams().equal(quantizer.qparams())
    assert (twin.spec, twin.calibrated, twin.training) == (quantizer.spec, True, True)
    twin(torch.tensor([-50.0, 50.0]))
    assert state(quantizer) != state(twin)
    weight = WeightQuantizer(WeightSpec(4), 1)
    assert copier(weight).qparams(torch.eye(3)).equal(weight.qparams(torch.eye(3)))


def test_print_shows_bits_and_range() -> None:
    assert repr(calibrated()) == "ActivationQuantizer(8 bits, affine, range=[-1, 1.55])"
    assert "4 bits, symmetric, no range yet" in repr(
        ActivationQuantizer(ActivationSpec(4, symmetric=True))
    )
    assert repr(WeightQuantizer(WeightSpec(), 0)) == "WeightQuantizer(8 bits, per_channel, minmax)"


# Weights


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_weight_equals_the_formula_in_numpy(axis: int | None, bits: int) -> None:
    weight = torch.randn(4, 4, 3)
    spec = WeightSpec(bits, "per_tensor" if axis is None else "per_channel")
    quantizer = WeightQuantizer(spec, axis or 0)
    w = weight.numpy()
    others = tuple(d for d in range(3) if d != axis)
    top = np.abs(w).max(axis=others, keepdims=True) if axis is not None else np.abs(w).max()
    half = {8: 127, 4: 7.5, 2: 1.5}[bits]
    low, high = {8: (-127, 127), 4: (-8, 7), 2: (-2, 1)}[bits]
    scale = (top / np.float32(half)).astype(np.float32)
    expected = np.clip(np.rint(w / scale), low, high) * scale
    found = quantizer.qparams(weight)
    assert np.array_equal(found.scale.numpy(), scale.reshape(found.scale.shape))
    assert found.axis == axis
    assert np.array_equal(quantizer(weight).numpy(), expected)


def test_a_weight_per_channel_equals_torch() -> None:
    weight = torch.randn(4, 4, 3)
    # The largest weight of every channel makes its scale 2**-7: exact in torch's way, too.
    weight = (weight / weight.abs().max() * 0.9).index_fill(2, torch.tensor(0), 127 / 128)
    expected = torch.fake_quantize_per_channel_affine(
        weight, torch.full((4,), 2.0**-7), torch.zeros(4, dtype=torch.int32), 1, -127, 127
    )
    assert torch.equal(WeightQuantizer(WeightSpec(), 1)(weight), expected)


def test_arq_uses_the_full_grid_and_the_farther_side() -> None:
    weight = torch.tensor([[-1.28, 1.0], [-1.0, 1.27]])
    quantizer = WeightQuantizer(WeightSpec(quantizer="arq"), 0)
    assert (quantizer.grid.qmin, quantizer.grid.qmax) == (-128, 127)
    expected = torch.stack((torch.tensor(1.28) / 128, torch.tensor(1.27) / 127))
    assert torch.equal(quantizer.qparams(weight).scale, expected)


def test_a_weight_is_never_overwritten_and_gets_the_whole_gradient() -> None:
    # The scale is 1, and 1.5 steps round to 2: the largest weight saturates.
    weight = nn.Parameter(torch.tensor([[1.5, -1.5, 0.2, 0.9]]))
    before = weight.detach().clone()
    incoming = torch.randn(1, 4)
    (WeightQuantizer(WeightSpec(2), 0)(weight) * incoming).sum().backward()
    assert torch.equal(weight, before)
    assert weight.grad is not None
    assert torch.equal(weight.grad, incoming)


def test_the_scale_follows_the_weight_at_every_forward() -> None:
    quantizer, weight = WeightQuantizer(WeightSpec(), 0), torch.randn(2, 3)
    assert torch.equal(quantizer.qparams(weight * 4).scale, quantizer.qparams(weight).scale * 4)
    assert torch.equal(quantizer(weight * 4), quantizer(weight) * 4)


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    quantizer = WeightQuantizer(WeightSpec(), 0)
    assert quantizer(weight).tolist() == weight.tolist()
    assert quantizer.qparams(weight).scale[0].item() == 1.0


# Final numbers


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_a_final_weight_is_the_fake_quantized_weight(bits: int, granularity: Any) -> None:
    weight = torch.randn(4, 3, 2)
    quantizer = WeightQuantizer(WeightSpec(bits, granularity), 0)
    final = FinalWeight.from_weight(weight, quantizer.qparams(weight), "layer.weight")
    assert final.integers.dtype is torch.int8
    assert torch.equal(final(None), quantizer(weight))


def test_a_final_activation_is_the_quantizer_in_eval_mode() -> None:
    quantizer, x = calibrated().eval(), torch.randn(100)
    final = FinalActivation(quantizer.qparams(), "layer.input")
    assert torch.equal(final(x), quantizer(x))


def test_a_final_activation_has_numbers_of_its_own() -> None:
    quantizer = calibrated()
    final = FinalActivation(quantizer.qparams(), "layer.input")
    before = final.scale.clone()
    quantizer(torch.tensor([-50.0, 50.0]))
    assert torch.equal(final.scale, before)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_activation_takes_all_the_values_that_its_bits_allow_and_no_more(bits: int) -> None:
    y = ActivationQuantizer(ActivationSpec(bits))(torch.linspace(-1, 1.5, 5000))
    assert len(y.unique()) == 2**bits


def test_a_range_that_is_exchanged_through_data_counts_at_once() -> None:
    """As averages of weights and buffers do it, between two forwards."""
    quantizer = ActivationQuantizer(ActivationSpec())
    quantizer(torch.tensor([-1.0, 1.0]))
    quantizer.eval()(torch.tensor([5.0]))
    quantizer.max_val.data.copy_(torch.tensor(9.0))
    assert float(quantizer(torch.tensor([5.0]))) == pytest.approx(5.0, abs=0.03)
