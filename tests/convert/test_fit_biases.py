"""Channels of almost no weight, as residual branches that start at zero have them."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import export, prepare, verify
from lightning_qat.convert.convert import convert


def _trained(gamma: float, x: Tensor) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    prepare(net, "int8")
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        parameters["1.weight"][:] = torch.tensor([1.0, gamma, 0.5, 1.0])
        parameters["1.bias"][:] = torch.tensor([0.1, 0.25, -0.2, 0.3])
        net(x)
    return net.eval()


def test_the_weights_of_a_channel_of_almost_nothing_are_coarser_and_its_bias_fits(
    tmp_path: Path,
) -> None:
    x = torch.randn(4, 3, 6, 6)
    qat = _trained(1e-9, x)
    expected = qat(x)
    with pytest.warns(UserWarning, match=r"^0: the weights of 1 of 4 channels are so small"):
        model = convert(qat, x)
    (layer,) = model.layers
    assert layer.bias is not None
    step = (
        model.tensors[layer.input_key].qparams.scale * model.tensors[layer.weight_key].qparams.scale
    )
    steps = layer.bias / step
    # Hand-worked: the scale is chosen so that this bias has 2**30 steps; the others keep theirs.
    assert steps[1].item() == pytest.approx(2.0**30, rel=1e-6)
    assert steps.abs().max() < 2.0**31
    grid_step = model.tensors[next(reversed(model.tensors))].qparams.scale
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-3 * grid_step.item())
    agreement = verify(model, export(model, "cann", tmp_path / "net"))
    assert agreement.parameter_differences == ()
    assert max(runtime.max_steps for runtime in agreement.runtimes) <= 1.0


@pytest.mark.parametrize("gamma", [0.0, 1e-4])
def test_nothing_changes_where_biases_fit(gamma: float) -> None:
    x = torch.randn(4, 3, 6, 6)
    qat = _trained(gamma, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(qat, x)


def test_a_weight_with_one_scale_for_all_channels_stays_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight[:] = 1e-12
        net[0].bias[:] = 5.0
    x = torch.randn(4, 3)
    prepare(net, {"weight": {"granularity": "per_tensor"}}, x)
    net(x)
    before = net[0].weight.detach().abs().max()
    model = convert(net.eval(), x)
    assert model.tensors[model.layers[0].weight_key].qparams.scale.item() < before
