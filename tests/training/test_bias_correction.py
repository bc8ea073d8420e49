"""Biases and batch norms take back the shift of each layer's mean; nothing else changes."""

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import calibrate_unseen, prepare
from lightning_qat.quantizers.switches import switch
from lightning_qat.training.bias_correction import BiasCorrection

TWO_BITS = {"activation": {"bits": 2}}


def corrected(model: nn.Module, x: Tensor, recipe: object = TWO_BITS) -> int:
    prepare(model.eval(), recipe, x)  # type: ignore[arg-type]
    calibrate_unseen(model, x)
    with (correction := BiasCorrection(model)):
        correction.run(lambda: model(x))
    return correction.apply()


def unit_conv() -> nn.Conv2d:
    conv = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.bias.zero_()  # type: ignore[union-attr]
    return conv


STEPS = torch.tensor([0.0, 0.4, 0.4, 3.0]).reshape(4, 1, 1, 1)
"""Two bits round it to 0, 0, 0, 3: mean 0.95 to 0.75, variance 1.4275 to 1.6875."""


def test_a_bias_takes_the_shift_of_its_channel() -> None:
    model = nn.Sequential(unit_conv())
    assert corrected(model, STEPS) == 1
    torch.testing.assert_close(model[0].bias.detach(), torch.tensor([0.2]))


def test_a_batch_norm_takes_the_shift_and_the_change_of_variance() -> None:
    conv = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(conv.weight)
    model = nn.Sequential(conv, nn.BatchNorm2d(1))
    model[1].running_mean.fill_(5.0)
    model[1].running_var.fill_(7.0)
    assert corrected(model, STEPS) == 1
    # What training has estimated stays; only the change is measured.
    torch.testing.assert_close(model[1].running_mean, torch.tensor([5.0 - 0.2]))
    torch.testing.assert_close(model[1].running_var, torch.tensor([7.0 * 1.6875 / 1.4275]))


def test_a_channel_that_quantization_makes_constant_keeps_a_variance() -> None:
    conv = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(conv.weight)
    model = nn.Sequential(conv, nn.BatchNorm2d(1))
    quiet = torch.cat([torch.full((4, 1, 1, 1), 0.1), torch.full((4, 1, 1, 1), 0.2)])
    prepare(model.eval(), {"activation": {"bits": 2, "clip": (0.0, 3.0)}}, quiet)
    with (correction := BiasCorrection(model)):
        correction.run(lambda: model(quiet))
    correction.apply()
    assert model[1].running_var.item() == pytest.approx(1 / 4)


def test_a_layer_answers_for_its_own_error_alone() -> None:
    # The second layer, of 16 bits, reads what the first makes after its correction.
    model = nn.Sequential(unit_conv(), unit_conv())
    fine = {"activation": {"bits": 16, "symmetric": True, "clip": (-4.0, 4.0)}}
    corrected(model, STEPS, {**TWO_BITS, "overrides": {"1": fine}})
    assert model[0].bias.item() == pytest.approx(0.2)
    assert model[1].bias.item() == pytest.approx(0.0, abs=1e-3)


def test_batches_count_alike() -> None:
    model = nn.Sequential(unit_conv())
    prepare(model.eval(), TWO_BITS, STEPS)
    calibrate_unseen(model, STEPS)
    exact = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(4, 1, 1, 1)
    with (correction := BiasCorrection(model)):
        for x in (STEPS, exact):
            correction.run(lambda x=x: model(x))  # type: ignore[misc]
    correction.apply()
    assert model[0].bias.item() == pytest.approx(0.1)


class Residual(nn.Module):
    """A batch norm, a convolution with a bias, a sum and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = x + torch.relu(self.second(x))
        return self.head(x.mean((2, 3)))


def test_the_mean_of_an_output_is_the_float_models() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(64, 3, 8, 8)
    for _ in range(20):
        model(x)
    with torch.no_grad():
        expected = model.eval()(x).mean(0)
    prepare(model, {"weight": {"bits": 4}, "activation": {"bits": 4}, "outputs": False}, x)
    calibrate_unseen(model, x)
    switch(model, quantizing=True)

    def shift() -> Tensor:
        with torch.no_grad():
            return (model(x).mean(0) - expected).abs().max()

    before, state = shift(), {k: v.clone() for k, v in model.state_dict().items()}
    with (correction := BiasCorrection(model)):
        correction.run(lambda: model(x))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert correction.apply() == 3
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {"norm.running_mean", "norm.running_var", "second.bias", "head.bias"}
    assert shift() < before / 100


def test_an_exact_network_is_left_as_it_is() -> None:
    model = nn.Sequential(unit_conv())
    exact = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(4, 1, 1, 1)
    corrected(model, exact)
    assert model[0].bias.item() == 0.0
