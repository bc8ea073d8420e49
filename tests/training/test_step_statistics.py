"""What a training step shows of its quantizers, by hand-worked numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.training.step_statistics import StepStatistics


def range_of(layer: nn.Module, low: float, high: float) -> None:
    quantizer = layer.input_quantizer
    quantizer.min_val.fill_(low)
    quantizer.max_val.fill_(high)
    quantizer.batches.fill_(1)
    quantizer.calibrated = True
    quantizer.observing = False
    quantizer.range_changed()


def prepared(model: nn.Module, x: Tensor) -> nn.Module:
    prepare(model, {"outputs": False}, x)
    return model


def test_values_outside_the_range_count_as_clipped() -> None:
    x = torch.arange(-50, 50, dtype=torch.float32).reshape(10, 10)
    model = prepared(nn.Sequential(nn.Linear(10, 2)), x)
    range_of(model[0], -12.8, 12.7)  # steps of 0.1
    step = StepStatistics(model)
    model(x)
    numbers = step.finish().numbers
    # -50 .. -13 and 13 .. 49: all but the 25 from -12 to 12.
    assert numbers["clipped/0"] == pytest.approx(0.75)
    assert numbers["range_min/0"] == pytest.approx(-12.8)
    assert numbers["range_max/0"] == pytest.approx(12.7)


def test_what_a_fused_relu_has_clipped_is_counted_and_it_stays_fused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    torch.manual_seed(0)
    x = torch.randn(64, 4) * 10
    model = prepared(Net(), x).train()
    for _ in range(3):
        model(x)
    range_of(model.b, 0.0, 2.55)
    hidden = F.relu(
        F.linear(model.a.input_quantizer(x), model.a.weight_quantizer(model.a.weight), model.a.bias)
    )
    calls: list[object] = []
    original = type(model.b.input_quantizer).quantize_clamped

    def counted(self: object, *args: object) -> object:
        calls.append(self)
        return original(self, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.b.input_quantizer), "quantize_clamped", counted)
        step = StepStatistics(model)
        with_statistics = model(x)
        numbers = step.finish().numbers
        without = model(x)
    assert calls == [model.b.input_quantizer] * 2
    assert torch.equal(with_statistics, without)
    assert numbers["clipped/b"] == pytest.approx(float((hidden > 2.555).float().mean()), abs=1e-6)
    assert numbers["clipped/b"] > 0.1


def test_the_noise_of_a_weight_is_that_of_the_formula() -> None:
    x = torch.randn(8, 6)
    model = prepared(nn.Sequential(nn.Linear(6, 4)), x)
    model(x)
    weight = model[0].weight.detach().double()
    scale = weight.abs().amax(1, keepdim=True) / 127
    noise = (weight / scale).round() * scale - weight
    numbers = StepStatistics(model).finish().numbers
    decibels = 10 * math.log10(float(weight.square().sum() / noise.square().sum()))
    assert numbers["weight_sqnr_db/0.weight"] == pytest.approx(decibels, abs=0.01)
    assert numbers["weight_scale/0.weight"] == pytest.approx(float(scale.mean()), rel=1e-5)


def test_an_exact_weight_has_no_ratio_to_log() -> None:
    model = prepared(nn.Sequential(nn.Linear(2, 1)), torch.randn(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[127.0, -5.0]]))
    assert "weight_sqnr_db/0.weight" not in StepStatistics(model).finish().numbers


def test_nothing_is_left_on_the_model() -> None:
    x = torch.randn(4, 6)
    model = prepared(nn.Sequential(nn.Linear(6, 4)), x).train()
    model(x)
    before = model[0].input_quantizer.min_val.clone()
    for end in ("finish", "cancel"):
        step = StepStatistics(model)
        getattr(step, end)()
        assert not model[0].input_quantizer._forward_pre_hooks
    assert torch.equal(model[0].input_quantizer.min_val, before)


def test_a_compiled_model_gets_no_hooks() -> None:
    x = torch.randn(4, 6)
    model = prepared(nn.Sequential(nn.Linear(6, 4)), x)
    model(x)
    model[0].compile(backend="eager")
    step = StepStatistics(model)
    assert not model[0].input_quantizer._forward_pre_hooks
    numbers = step.finish().numbers
    assert "range_min/0" in numbers
    assert "clipped/0" not in numbers
