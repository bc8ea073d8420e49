"""A tensor that depends on parameters alone is a weight, whoever wrote the product of it."""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import convert, export, prepare, verify
from lightning_qat.joins.apply import plan_of
from lightning_qat.quantizers.activation import ParameterQuantizer


class Product(nn.Module):
    """A weight without a layer, far from symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.w = nn.Parameter(torch.linspace(-0.2, 1.0, 24).view(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.stem(x)) @ self.w


class LoRA(nn.Module):
    """Two low-rank factors beside a layer, as loralib writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + x @ self.a.T @ self.b.T * 0.5
        return result


class WeightStandardized(nn.Conv2d):
    """Its weight is computed in forward: mean 0 and standard deviation 1 per channel."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return F.conv2d(input, (self.weight - mean) / std, self.bias)


def trained(model: nn.Module, x: Tensor) -> Any:
    prepare(model, "int8", x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def weights(model: nn.Module) -> dict[str, ParameterQuantizer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ParameterQuantizer)}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Product, ["qat_joins.matmul_0_1"]),
        (LoRA, ["qat_joins.matmul_0_1", "qat_joins.matmul_1_1"]),
        (lambda: nn.Sequential(WeightStandardized(1, 2, 3), nn.Flatten(), nn.Linear(32, 2)), []),
    ],
    ids=["parameter", "lora", "weight standardisation"],
)
def test_the_plan_calls_it_a_weight(kind: Any, expected: list[str]) -> None:
    model = kind()
    x = torch.randn(3, 1, 6, 6) if not expected else torch.randn(3, 6)
    report = prepare(model, "int8", x)
    assert list(weights(model)) == expected
    assert str(report.joins).count("(8 bits, weight)") == len(expected)
    # What is computed from weights alone is no join and no float product.
    assert not any(word in str(report.joins) for word in ("sub", "div", "std", "mean", "transpose"))


def test_the_range_of_a_weight_is_its_own_and_symmetric() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    model = trained(Product(), x)
    (quantizer,) = weights(model).values()
    model.eval()(x)
    scale, zero_point = quantizer.scale_and_zero_point()
    assert int(zero_point) == 0
    assert float(scale) == pytest.approx(float(model.w.detach().abs().max()) / 127, rel=1e-6)
    # Frozen observers change nothing about it.
    with torch.no_grad():
        model.w.mul_(3)
    model(x)
    assert float(quantizer.scale_and_zero_point()[0]) == pytest.approx(3 * float(scale), rel=1e-6)


@pytest.mark.parametrize("target", ["fake_quant_onnx", "cann", "tflite"])
@pytest.mark.parametrize("kind", [Product, LoRA])
def test_every_target_computes_the_trained_model(kind: Any, target: str, tmp_path: Any) -> None:
    if target == "tflite":
        pytest.importorskip("litert_torch")
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    model = trained(kind(), x)
    quantized = convert(model, x)
    artifact = export(quantized, target, tmp_path / "net")
    agreement = verify(quantized, artifact, x)
    assert agreement.max_steps <= 1, str(agreement)
    assert torch.allclose(quantized(x), model.eval()(x), atol=1e-6)


def test_the_file_holds_the_integers_of_the_last_step(tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    model = trained(Product(), x)
    artifact = export(convert(model, x), "fake_quant_onnx", tmp_path / "net")
    session = ort.InferenceSession(artifact.files["model"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(found - model.eval()(x).detach().numpy()).max() < 0.1


def test_four_bits_of_weights_count_here_too() -> None:
    model = Product()
    prepare(model, {"weight": {"bits": 4}}, torch.randn(2, 6))
    (quantizer,) = weights(model).values()
    assert quantizer.spec.bits == 4
    state, again = model.state_dict(), Product()
    prepare(again, {"weight": {"bits": 4}})
    again.load_state_dict(state)
    assert plan_of(again) == plan_of(model)
    assert list(weights(again)) == list(weights(model))
