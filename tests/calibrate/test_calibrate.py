"""``calibrate`` quantizes a float model on batches: its numbers export, its mean error is small."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat import calibrate, convert, export, prepare, verify


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    pictures, labels = load_digits(return_X_y=True)
    return torch.tensor(pictures, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(
        labels
    )


def block(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def small_network() -> nn.Module:
    return nn.Sequential(
        *(block(1, 16, 3), block(16, 16, 3, groups=16), block(16, 32, 1)),
        *(block(32, 32, 3, 2, groups=32), block(32, 64, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x, y = digits
    model = small_network()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for start in range(0, 1200, 100):
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x[start : start + 100]), y[start : start + 100]).backward()
            optimizer.step()
    return model.state_dict()


def accuracy(model: nn.Module, digits: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((model.eval()(digits[0][1200:]).argmax(1) == digits[1][1200:]).float().mean())


def test_corrected_biases_save_a_network_of_two_bits(
    digits: tuple[Tensor, Tensor], trained: dict[str, Tensor]
) -> None:
    two_bits = {"weight": {"bits": 2, "quantizer": "learned"}}  # from the least squared error
    found = []
    for correct in (False, True):
        model = small_network()
        model.load_state_dict(trained)
        batches = [digits[0][start : start + 100] for start in range(0, 400, 100)]
        calibrate(model, batches, two_bits, correct_biases=correct)
        found.append(accuracy(model, digits))
    assert found[1] > found[0] + 0.1


def test_the_result_is_exported_as_it_is(
    digits: tuple[Tensor, Tensor], trained: dict[str, Tensor], tmp_path: Path
) -> None:
    model = small_network().eval()
    model.load_state_dict(trained)
    float_accuracy = accuracy(model, digits)
    calibrate(model, digits[0][:256])
    assert not model.training
    assert accuracy(model, digits) > float_accuracy - 0.02
    quantized = convert(model, digits[0][:2])
    artifact = export(quantized, "fake_quant_onnx", tmp_path / "net")
    agreement = verify(quantized, artifact, digits[0][1200:1264])
    assert not agreement.parameter_differences


def test_a_model_that_is_quantized_already_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    prepare(model, "int8")
    with pytest.raises(ValueError, match="this Sequential is quantized already"):
        calibrate(model, torch.randn(4, 2))


def test_no_data_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), [])


def test_constant_data_are_said() -> None:
    with pytest.warns(UserWarning, match="'0' had the same value in all batches"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), torch.zeros(4, 2))


def test_data_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), torch.full((4, 2), torch.nan))
