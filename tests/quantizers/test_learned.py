"""Learned steps and clips: gradients against double precision, and what training starts from."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import ActivationSpec, Recipe, WeightSpec, convert, export, prepare, verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.arithmetic import affine_qparams
from lightning_qat.numerics.calibration.search import least_squares_scale
from lightning_qat.numerics.fake_quantize import fake_quantize
from lightning_qat.numerics.kernels import loops as kernels
from lightning_qat.numerics.learned_fake_quantize import learned_fake_quantize
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.quantizers.factory import activation_quantizer, quantizer_parameters
from lightning_qat.quantizers.learned_activation import (
    LearnedClipActivation,
    LearnedStepActivation,
)
from lightning_qat.quantizers.learned_weight import LearnedWeightQuantizer
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.learned_weights import follow_weights, learned_weights
from lightning_qat.training.phases import apply_phase
from lightning_qat.training.range_sync import commit_ranges

GRIDS = [IntegerGrid(-2, 1), IntegerGrid(-8, 7), IntegerGrid(-127, 127), IntegerGrid(-128, 127)]


def values(*shape: int) -> Tensor:
    """Exact in float32, and by chance never on a rounding point, where no derivative exists."""
    return (torch.randn(*shape) * 2).double()


# The formulas, written down once more in double precision


def lsq_gradient(x: Tensor, scale: float, grad: Tensor, grid: IntegerGrid) -> tuple[Tensor, float]:
    v = x / scale
    inside = (v.round() >= grid.qmin) & (v.round() <= grid.qmax)
    slope = torch.where(inside, v.round() - v, v.round().clamp(grid.qmin, grid.qmax))
    return grad * inside, float((grad * slope).sum())


def ulq_gradient(
    x: Tensor, low: float, high: float, grad: Tensor, grid: IntegerGrid
) -> tuple[float, float]:
    """spec: U = x above, L = x below, e = (rint(t) - t) / (2^b - 1) with t of the clipped x."""
    steps = grid.qmax - grid.qmin
    s = (high - low) / steps
    o = torch.round(torch.tensor(grid.qmin - low / s, dtype=torch.float64))
    above, below = (x / s).round() > grid.qmax - o, (x / s).round() < grid.qmin - o
    e = torch.where(above | below, 0.0, (x / s).round() - x / s) / steps
    to_high = float((grad * (e + above.double())).sum())
    return float((grad * (below.double() - e)).sum()), to_high


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_gradients_of_a_symmetric_step_are_lsq_s(grid: IntegerGrid) -> None:
    x, grad = values(50), torch.randn(50, dtype=torch.float64)
    scale = torch.tensor(0.375, requires_grad=True)
    leaf = x.float().requires_grad_()
    y = learned_fake_quantize(leaf, scale, None, grid, normalized=False)
    y.backward(grad.float())
    of_x, of_scale = lsq_gradient(x, scale.item(), grad, grid)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), of_x, rtol=1e-6, atol=1e-6)
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(of_scale, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("low", [-1.3, 0.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradients_of_two_clips_are_ulq_s(low: float, bits: int) -> None:
    spec = ActivationSpec(bits=bits, quantizer="ulq", clip=(low, 2.1))
    quantizer = LearnedClipActivation(spec)
    x, grad = values(200), torch.randn(200, dtype=torch.float64)
    quantizer(x.float()).backward(grad.float())
    assert quantizer.clip_min is not None
    ends = quantizer.clip_min.item(), quantizer.clip_max.item()
    to_low, to_high = ulq_gradient(x, *ends, grad, quantizer.grid)
    assert quantizer.clip_max.grad is not None
    assert float(quantizer.clip_max.grad) == pytest.approx(to_high, rel=1e-3, abs=1e-3)
    assert quantizer.clip_min.grad is not None
    assert float(quantizer.clip_min.grad) == pytest.approx(to_low, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("end", ["scale", "low"])
def test_outside_the_range_the_gradients_are_finite_differences(end: str) -> None:
    """There the function is linear in both, so no rounding hides its derivative."""
    grid, x = IntegerGrid(-8, 7), torch.tensor([-50.0, 60.0, 70.0])
    at = {"scale": torch.tensor(0.25, requires_grad=True), "low": torch.tensor(-1.5)}
    at["low"].requires_grad_()
    learned_fake_quantize(x, at["scale"], at["low"], grid, normalized=False).sum().backward()
    step = 0.25 if end == "low" else 0.0  # a whole step of the grid: the zero point moves by one
    step = step or 0.05
    moved = {name: t.detach().clone() for name, t in at.items()}

    def total(sign: float) -> float:
        shifted = dict(moved)
        shifted[end] = moved[end] + sign * step
        if end == "scale":
            # With the zero point held: the lower end stays where it is.
            return float((x < 0).sum() * shifted["low"]) + float((x > 0).sum()) * (
                float(shifted["low"]) + 15 * float(shifted["scale"])
            )
        return float(learned_fake_quantize(x, shifted["scale"], shifted["low"], grid).sum())

    difference = (total(1.0) - total(-1.0)) / (2 * step)
    gradient = at[end].grad
    assert gradient is not None
    assert float(gradient) == pytest.approx(difference, rel=1e-4)


def test_per_channel_scales_get_the_gradients_of_their_own_channel() -> None:
    x, grid = values(3, 4, 5).float(), IntegerGrid(-8, 7)
    scale = torch.tensor([0.2, 0.3, 0.4, 0.5], requires_grad=True)
    learned_fake_quantize(x, scale, None, grid, axis=1, normalized=False).square().sum().backward()
    for channel in range(4):
        own = scale.detach()[channel].clone().requires_grad_()
        y = learned_fake_quantize(x[:, channel], own, None, grid, normalized=False)
        y.square().sum().backward()
        assert scale.grad is not None
        assert own.grad is not None
        torch.testing.assert_close(scale.grad[channel], own.grad)


def test_normalized_gradients_are_divided_by_the_root_of_count_and_steps() -> None:
    x, grid = values(100).float(), IntegerGrid(-8, 7)
    gradients = []
    for normalized in (True, False):
        scale = torch.tensor(0.3, requires_grad=True)
        learned_fake_quantize(x, scale, None, grid, normalized=normalized).sum().backward()
        assert scale.grad is not None
        gradients.append(float(scale.grad))
    assert gradients[0] == pytest.approx(gradients[1] / (100 * 7) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_fake_quantization_of_observed_ranges_to_the_bit(dtype: torch.dtype) -> None:
    x, grid = torch.randn(1000).to(dtype), IntegerGrid(-8, 7)
    low, high = torch.tensor(-1.1), torch.tensor(1.7)
    scale, zero_point = affine_qparams(low, high, grid)
    learned = learned_fake_quantize(x, scale, low, grid)
    assert learned.dtype == dtype
    assert torch.equal(learned, fake_quantize(x, scale, zero_point, grid))


# Where learning starts


def test_the_least_squares_scale_is_the_best_of_a_fine_search() -> None:
    x, grid = torch.randn(4, 500), IntegerGrid(-2, 1)
    start = x.abs().amax(1) / 1.5

    def error(scale: Tensor) -> Tensor:
        wide = scale[:, None]
        return ((x / wide).round().clamp(-2, 1) * wide - x).square().sum(1)

    best = torch.stack([error(start * r) for r in torch.arange(0.1, 1.2, 0.002)]).amin(0)
    found = error(least_squares_scale(x, start, grid, 0))
    assert bool((found <= best * 1.01).all())
    assert bool((found < error(start)).all())


@pytest.mark.parametrize("kind", ["learned", "ulq"])
@pytest.mark.parametrize("fixed_min", [None, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_learning_starts_where_calibration_ends(
    kind: Any, fixed_min: bool | None, symmetric: bool
) -> None:
    if fixed_min and symmetric:
        return
    options: dict[str, Any] = {"bits": 4, "symmetric": symmetric, "fixed_min": fixed_min}
    observed = activation_quantizer(ActivationSpec(**options))
    learned = activation_quantizer(ActivationSpec(quantizer=kind, **options))
    for quantizer in (observed, learned):
        quantizer.deferred, quantizer.quantizing = True, False
        for number in range(3):
            quantizer(torch.linspace(-1.0, 2.0 + number, 20))
            assert quantizer.pending is not None
            quantizer.commit(quantizer.pending)
        quantizer.quantizing = True
    x = torch.linspace(-1.5, 4.0, 50)
    assert torch.equal(observed.eval()(x), learned.eval()(x))
    assert observed.qparams().equal(learned.qparams())


@pytest.mark.parametrize("kind", ["learned", "ulq"])
def test_once_it_quantizes_only_gradients_move_the_range(kind: Any) -> None:
    quantizer = activation_quantizer(ActivationSpec(quantizer=kind))
    quantizer(torch.linspace(-1.0, 1.0, 9))
    before = quantizer.qparams()
    quantizer(torch.linspace(-50.0, 50.0, 9))
    assert before.equal(quantizer.qparams())
    assert float(quantizer.batches) == 1


def test_a_learned_weight_starts_once_from_the_weight_of_the_first_training_forward() -> None:
    quantizer = LearnedWeightQuantizer(WeightSpec(bits=4, quantizer="learned"), 0, 3)
    weight = torch.randn(3, 8)
    quantizer.eval()(weight)
    assert not quantizer.ready
    quantizer.train()(weight)
    start = quantizer.half_width.detach().clone()
    quantizer(weight * 9)
    assert torch.equal(quantizer.half_width, start)
    again = LearnedWeightQuantizer(WeightSpec(bits=4, quantizer="learned"), 0, 3)
    again.load_state_dict(quantizer.state_dict())
    again(weight * 0.1)
    assert torch.equal(again.half_width, start)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weights_scale_of_an_earlier_checkpoint_is_the_same_to_the_bit(bits: int) -> None:
    quantizer = LearnedWeightQuantizer(WeightSpec(bits=bits, quantizer="learned"), 0, 3)
    quantizer.train()(torch.randn(3, 8))
    stored = quantizer.state_dict()
    scale = torch.rand(3) / 100
    del stored["half_width"]
    again = LearnedWeightQuantizer(WeightSpec(bits=bits, quantizer="learned"), 0, 3)
    again.load_state_dict({**stored, "scale": scale})
    assert torch.equal(again.step(), scale)


def test_a_step_of_adam_moves_a_weights_range_by_the_learning_rate_at_8_bits() -> None:
    # The scale is 1 / 127: a parameter that is the scale would have moved by half of itself.
    quantizer = LearnedWeightQuantizer(
        WeightSpec(quantizer="learned", initial="minmax", granularity="per_tensor"), 0, 1
    )
    weight = torch.linspace(-1.0, 1.0, 100).reshape(1, 100)
    quantizer.train()(weight).square().sum().backward()
    torch.optim.Adam(quantizer.parameters(), lr=4e-3).step()
    largest = float(quantizer.step().detach() * 127)
    assert largest == pytest.approx(1.0, abs=4e-3)
    assert largest != 1.0


# In a model


def learned_recipe(quantizer: Any = "learned", bits: int = 4, **more: Any) -> Recipe:
    return Recipe(
        weight=WeightSpec(bits=bits, quantizer=quantizer),
        activation=ActivationSpec(bits=bits, quantizer=quantizer, calibration="mse"),
        **more,
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        nn.init.uniform_(self.norm.weight, -1.5, 1.5)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.head((x + self.deep(x)).mean((2, 3)))


def trained(recipe: Recipe, steps: int = 4) -> tuple[nn.Module, Tensor]:
    model, x = Net(), torch.randn(8, 2, 6, 6)
    prepare(model, recipe, x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(torch.randn_like(x)).square().mean().backward()
        optimizer.step()
    return model.eval(), x


@functools.cache
def learned(quantizer: str, bits: int) -> tuple[Tensor, Tensor, QuantizedModel]:
    """An input, what the trained model makes of it, and the model converted; for both targets."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = trained(learned_recipe(quantizer, bits))
        with torch.no_grad():
            expected = model(x)
        with warnings.catch_warnings():
            if quantizer == "ulq":  # AMCT's grid has no +128
                warnings.filterwarnings("ignore", ".*saturate at 127")
            return x, expected, convert(model, x)


@pytest.mark.xdist_group("learned files")
@pytest.mark.parametrize("quantizer", ["learned", "ulq"])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("target", ["fake_quant_onnx", "cann"])
def test_files_hold_what_was_learned(
    quantizer: str, bits: int, target: str, tmp_path: Path
) -> None:
    x, expected, quantized = learned(quantizer, bits)
    steps = (quantized(x) - expected).abs() / quantized.output_steps["output"]
    if not (quantizer == "ulq" and bits == 8):  # AMCT's grid saturates +128 when it is folded
        assert float(steps.max()) <= 1.01
        assert float((steps > 0.5).float().mean()) < 0.1
    agreement = verify(quantized, export(quantized, target, tmp_path / "net"), x)
    assert agreement.parameters_equal, agreement
    # CANN rounds biases to the accumulator's grid, which is coarse at few bits.
    assert agreement.max_steps <= (1.01 if target == "fake_quant_onnx" else 2.01), agreement


def test_a_resumed_model_goes_on_from_the_same_numbers() -> None:
    model, x = trained(learned_recipe())
    other = Net()
    prepare(other, learned_recipe(), x)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(model(x), other.eval()(x))
    model.train()(x)
    other.train()(x)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_every_quantizer_parameter_gets_a_gradient_and_is_listed() -> None:
    model, x = trained(learned_recipe(), steps=1)
    model.train()(x).square().mean().backward()
    listed = quantizer_parameters(model)
    names = [n for n, p in model.named_parameters() if any(p is q for q in listed)]
    assert all(n.endswith((".half_width", ".low")) for n in names)
    assert {n.split(".")[0] for n in names} == {"conv", "deep", "head", "qat_joins"}
    assert all(p.grad is not None and bool(torch.isfinite(p.grad)) for p in listed if not p.dim())


def test_scales_of_weights_and_ranges_of_activations_are_listed_apart() -> None:
    model, _ = trained(learned_recipe(), steps=1)
    scales, ranges = (quantizer_parameters(model, of) for of in ("weights", "activations"))
    names = {p: name for name, p in model.named_parameters()}
    assert [names[p] for p in scales] == [
        f"{layer}.weight_quantizer.half_width" for layer in ("conv", "deep", "head")
    ]
    assert not any("weight_quantizer" in names[p] for p in ranges)
    assert {*scales, *ranges} == {*quantizer_parameters(model)}
    wrong: Any = "weight"
    with pytest.raises(ValueError, match="of must be 'weights', 'activations' or None; got 'wei"):
        quantizer_parameters(model, wrong)


def test_learned_scales_stay_float32_in_a_half_precision_model() -> None:
    model, _ = trained(learned_recipe(), steps=1)
    before = [p.detach().clone() for p in quantizer_parameters(model)]
    model.to(torch.bfloat16)
    for parameter, value in zip(quantizer_parameters(model), before, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, value)


def test_a_calibration_phase_observes_and_the_next_one_learns() -> None:
    model, x = Net(), torch.randn(8, 2, 6, 6)
    prepare(model, learned_recipe(), x)
    apply_phase(model, Phase("calibrate", True, False, False))
    quantizer: Any = model.conv.input_quantizer
    assert isinstance(quantizer, LearnedStepActivation)
    for number in range(3):
        model.train()(x)
        commit_ranges(model)
        assert float(quantizer.batches) == number + 1
    apply_phase(model, Phase("quantize", True, True, False))
    model(x * 9)
    commit_ranges(model)
    assert float(quantizer.batches) == 3


def test_learned_activations_need_the_plan_before_the_optimizer() -> None:
    with pytest.raises(ValueError, match=r"must be planned before training\. Pass example_inputs"):
        prepare(Net(), learned_recipe())
    prepare(Net(), learned_recipe(joins=False, outputs=False))


@pytest.mark.parametrize("loops", [False, True])
def test_learned_quantizers_compile_to_the_same_numbers(
    loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; eager mode's loops add the gradients of a scale in another order."""
    if not loops:
        monkeypatch.setattr(kernels, "compiled_loops", lambda: None)
    torch._dynamo.reset()
    model, x = trained(learned_recipe(), steps=2)
    model.train()
    follow_weights(learned_weights(model))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    for call, net in ((model, model), (compiled, twin)):
        net.zero_grad()
        call(x).square().mean().backward()
    for (name, one), two in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert one.grad is not None, name
        tolerance = 1e-5 if loops and name.endswith((".half_width", ".low")) else 0.0
        torch.testing.assert_close(one.grad, two.grad, rtol=tolerance, atol=0)
