"""torch.func and forward-mode differentiation of quantized models: right, or clearly refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)

from lightning_qat import Recipe, prepare
from lightning_qat.numerics import transforms
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec
from lightning_qat.training.phases import finish, set_compact

# torch loads its formulas of forward-mode differentiation by torch.jit.script, which it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


class Product(nn.Module):
    """A product written by hand, whose weight is a parameter of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Linear, relu, linear."""
        return self.head(torch.relu(x @ self.weight.t()))


def images() -> nn.Module:
    norm = nn.BatchNorm2d(2, track_running_stats=True)
    return nn.Sequential(
        nn.Unflatten(-1, (1, 2, 2)), nn.Conv2d(1, 2, 2), norm, nn.ReLU(), nn.Flatten(-3)
    )


LEARNED = Recipe(
    weight=WeightSpec(bits=4, quantizer="learned"),
    activation=ActivationSpec(bits=4, quantizer="learned"),
)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "layers": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "int8"),
    "learned": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), LEARNED),
    "product by hand": (Product, "int8"),
    "images": (images, "int8"),
}


def trained(network: str) -> nn.Module:
    make, recipe = NETWORKS[network]
    model = make()
    prepare(model, recipe, torch.randn(5, 4))
    for _ in range(20):
        model(torch.randn(5, 4))
    return model.eval()


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return parameters, dict(model.named_buffers())


def backward(model: nn.Module, x: Tensor) -> Mapping[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_of_a_function_are_those_of_backward(network: str, compact: bool) -> None:
    model, x = trained(network), torch.randn(5, 4)
    set_compact(model, compact)
    parameters, buffers = state(model)

    def loss(parameters: Mapping[str, Tensor]) -> Tensor:
        return functional_call(model, (parameters, buffers), (x,)).square().sum()

    found, expected = grad(loss)(parameters), backward(model, x)
    assert expected
    for name, value in expected.items():
        # Sums over the batch in another order; learned scales divide them.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["layers", "product by hand", "images"])
def test_gradients_per_sample_are_those_of_each_sample_alone(network: str) -> None:
    model, x = trained(network), torch.randn(3, 4)
    parameters, buffers = state(model)

    def loss(parameters: Mapping[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (sample[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for index in range(len(x)):
        for name, value in backward(model, x[index : index + 1]).items():
            torch.testing.assert_close(found[name][index], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_batched_model_gives_the_values_of_every_sample(network: str) -> None:
    model, x = trained(network), torch.randn(5, 4)
    # The products of one row and of five may be added up in another order: one step at most.
    step = 0.05
    found = vmap(functools.partial(_call_one, model))(x)
    torch.testing.assert_close(found, model(x), rtol=0, atol=step)


def test_an_ensemble_of_models_gives_the_values_of_each() -> None:
    models, x = [trained("layers") for _ in range(3)], torch.randn(5, 4)
    parameters, buffers = stack_module_state(models)

    def one(parameters: Any, buffers: Any) -> Tensor:
        return functional_call(models[0], (parameters, buffers), (x,))

    found = vmap(one)(parameters, buffers)
    torch.testing.assert_close(
        found, torch.stack([model(x) for model in models]), rtol=0, atol=0.05
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_jacobians_and_directional_derivatives_agree(network: str) -> None:
    model, x = trained(network), torch.randn(4)
    call = functools.partial(_call_one, model)
    rows = torch.stack([torch.autograd.grad(y, z)[0] for z, y in _outputs(model, x)])
    torch.testing.assert_close(jacrev(call)(x), rows)
    torch.testing.assert_close(jacfwd(call)(x), rows)
    direction = torch.randn(4)
    torch.testing.assert_close(jvp(call, (x,), (direction,))[1], rows @ direction)
    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(x, direction))
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, rows @ direction)


def _call_one(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x[None])[0]
    return result


def _outputs(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    found = []
    for index in range(len(_call_one(model, x))):
        leaf = x.clone().requires_grad_()
        found.append((leaf, _call_one(model, leaf)[index]))
    return found


def test_a_hessian_is_that_of_two_backward_passes() -> None:
    model, x = trained("layers"), torch.randn(4)

    def loss(x: Tensor) -> Tensor:
        return _call_one(model, x).square().sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in first]
    torch.testing.assert_close(hessian(loss)(x), torch.stack(rows))


def test_observing_in_a_transform_is_refused_and_the_remedies_work() -> None:
    model, x = trained("layers").train(), torch.randn(5, 4)
    before = {name: value.clone() for name, value in model.named_buffers()}
    with pytest.raises(RuntimeError, match=r"'0' observes.*model\.eval\(\).*finish\(model\)"):
        vmap(model)(x)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    finish(model)
    assert vmap(model)(x).shape == (5, 3)


def test_on_a_torch_without_the_private_parts_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = trained("layers"), torch.randn(5, 4)
    monkeypatch.setattr(transforms, "_innermost", lambda: None)
    monkeypatch.delattr(forward_ad, "_current_level")
    assert not transforms.is_transforming()
    assert model(x).shape == (5, 3)
    with pytest.raises(RuntimeError, match="data pointer"):
        vmap(model)(x)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("network", ["layers", "learned"])
@pytest.mark.parametrize(
    "surroundings", ["anomaly", "deterministic", "inference", "no denormals", "default device"]
)
def test_modes_of_torch_change_no_value(network: str, surroundings: str) -> None:
    model, x = trained(network), torch.randn(5, 4)
    expected = model(x).tolist()
    if surroundings == "anomaly":
        with torch.autograd.detect_anomaly(check_nan=True):
            found = model(x)
            found.sum().backward()
    elif surroundings == "deterministic":
        torch.use_deterministic_algorithms(True)
        found = model(x)
        found.sum().backward()
    elif surroundings == "inference":
        with torch.inference_mode():
            found = model(x)
    elif surroundings == "no denormals":
        torch.set_flush_denormal(True)
        try:
            found = model(x)
        finally:
            torch.set_flush_denormal(False)
    else:
        with torch.device("meta"):
            found = model(x)
    assert found.tolist() == expected


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_compiled_transform_and_a_transformed_graph_give_the_derivatives() -> None:
    """torch.compile drops the gradient of ``autograd.Function`` where it traces ``jvp``."""
    model, x, direction = trained("layers"), torch.randn(5, 4), torch.randn(5, 4)
    graph = torch.compile(model, backend="aot_eager")

    def tangent(call: Any) -> Tensor:
        result: Tensor = jvp(call, (x,), (direction,))[1]
        return result

    expected = tangent(model)
    torch.testing.assert_close(tangent(graph), expected)
    for transformed, value in ((tangent, expected), (lambda m: vmap(m)(x), model(x))):
        compiled = torch.compile(transformed, backend="aot_eager")(model)
        torch.testing.assert_close(compiled, value)
