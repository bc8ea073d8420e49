"""Weights that a hook or a parametrization computes: what it computes is quantized."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_qat import convert, export, prepare, verify
from lightning_qat.layers import Conv2dQAT, LinearQAT
from lightning_qat.prepare.prepare_like import prepare_like

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def halved(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Halved())


def weight_normed(layer: Any) -> Tensor:
    """The formula, in double precision: g v / |v|, per output channel."""
    if hasattr(layer, "weight_g"):
        g, v = layer.weight_g, layer.weight_v
    else:
        g, v = (getattr(layer.parametrizations.weight, f"original{n}") for n in (0, 1))
    v, g = v.detach().double(), g.detach().double()
    length = v.flatten(1).square().sum(1).sqrt().reshape(g.shape)
    return g * v / length


def spectral_normed(layer: Any) -> Tensor:
    """The weight over what power iteration estimates its largest singular value as."""
    if hasattr(layer, "weight_orig"):
        weight, u, v = layer.weight_orig, layer.weight_u, layer.weight_v
    else:
        inner = layer.parametrizations.weight
        weight, u, v = inner.original, inner[0]._u, inner[0]._v
    weight = weight.detach().double()
    return weight / (u.double() @ weight.flatten(1) @ v.double())


def halves(layer: Any) -> Tensor:
    return layer.parametrizations.weight.original.detach().double() / 2


WAYS = {
    "old weight_norm": (nn.utils.weight_norm, weight_normed),
    "new weight_norm": (parametrizations.weight_norm, weight_normed),
    "old spectral_norm": (nn.utils.spectral_norm, spectral_normed),
    "new spectral_norm": (parametrizations.spectral_norm, spectral_normed),
    "a parametrization of the user's": (halved, halves),
}
X = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(1))


def network(norm: Callable[[nn.Module], nn.Module]) -> Any:
    torch.manual_seed(0)
    conv = norm(nn.Conv2d(2, 3, 3))
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), norm(nn.Linear(27, 4)))


def trained(model: Any) -> Any:
    prepare(model, "int8", X)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_the_file_holds_the_integers_of_the_formula_after_the_last_step(
    way: str, tmp_path: Any
) -> None:
    norm, formula = WAYS[way]
    model = trained(network(norm))
    assert isinstance(model[0], Conv2dQAT)
    assert isinstance(model[3], LinearQAT)
    expected = [formula(model[index]) for index in (0, 3)]
    quantized = convert(model, X)
    for name, weight in zip(("0.weight", "3.weight"), expected, strict=True):
        tensor = quantized.tensors[name]
        assert tensor.integers is not None
        scale = weight.flatten(1).abs().amax(1) / 127
        assert np.allclose(tensor.qparams.scale, scale, rtol=1e-6)
        integers = weight / scale.reshape(-1, *[1] * (weight.dim() - 1))
        # Half a step is where rounding of the two may differ.
        assert (tensor.integers - integers).abs().max() <= 0.5 + 1e-4
    assert torch.allclose(quantized(X), model(X), atol=1e-6)
    artifact = export(quantized, "fake_quant_onnx", tmp_path / "net")
    assert artifact.differences == ()
    assert verify(quantized, artifact, X).max_steps <= 1
    # The arithmetic before the weight is no part of the graph.
    left = {str(node.target) for node in quantized.program.graph.nodes}
    assert not any(word in name for name in left for word in ("norm", "mv", "div", "mul"))


@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumes_and_its_own_parameters_learn(way: str) -> None:
    norm, _ = WAYS[way]
    start = {name: p.detach().clone() for name, p in network(norm).named_parameters()}
    model, again = trained(network(norm)), network(norm)
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters() if n in start)
    prepare_like(again, model.state_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(X), model(X))


def test_the_norm_can_be_removed_from_a_quantized_layer() -> None:
    old, new = trained(network(nn.utils.weight_norm)), trained(network(WAYS["new weight_norm"][0]))
    for model, remove in (
        (old, nn.utils.remove_weight_norm),
        (new, lambda layer: parametrize.remove_parametrizations(layer, "weight")),
    ):
        with torch.no_grad():
            before = model(X)
        for layer in (model[0], model[3]):
            remove(layer)
            assert isinstance(layer.weight, nn.Parameter)
        assert type(model[0]) is Conv2dQAT
        assert torch.allclose(model(X), before, atol=1e-6)
        convert(model, X)


def test_a_quantized_layer_becomes_a_parametrized_float_layer_again() -> None:
    model = trained(network(WAYS["new weight_norm"][0]))
    back: Any = model[3].to_float()
    assert not isinstance(back, LinearQAT)
    assert parametrize.is_parametrized(back)
    assert torch.allclose(back.weight.double(), weight_normed(back), atol=1e-6)
    assert isinstance(model[3], LinearQAT)


def test_nothing_of_the_norm_is_told_as_left_float() -> None:
    for norm, _ in WAYS.values():
        report = prepare(network(norm), "int8", X)
        assert report.joins is not None
        assert report.joins.left_float == ()


def test_weights_of_several_forwards_are_computed_anew() -> None:
    # spectral_norm changes its weight in every training forward.
    from lightning_qat.training.weights_once import weights_quantized_once

    model = trained(network(nn.utils.spectral_norm))
    with weights_quantized_once(model), torch.no_grad():
        before = model(X)
        model[0].weight_orig[0].mul_(3.0)
        assert not torch.equal(model(X), before)
