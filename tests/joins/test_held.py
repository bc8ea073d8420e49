"""Quantizers of a module's calls are parts of the module, but none of its children."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.joins.held import held_by
from lightning_qat.prepare.prepare import prepare
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.factory import quantizer_parameters

LEARNED = {"activation": {"quantizer": "learned"}}


class Pooling(nn.Sequential):
    """A Sequential with a forward of its own, as torchvision's ``ASPPPooling``."""

    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for layer in self:
            x = layer(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Residuals(nn.ModuleList):
    """A list with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for index in range(len(self)):
            x = x + self[index](x)
        for layer in self[1:]:
            x = x + layer(x)
        return x


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(3, 3, 1), Pooling()])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def network() -> nn.Sequential:
    return nn.Sequential(Residuals([nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)]), Head())


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)

OWNERS = ["0", "1", "1.branches.1"]


def children(model: nn.Module) -> dict[str, list[str]]:
    """What every module of the user's meets when it iterates."""
    return {
        path: list(module._modules)
        for path, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList | Head)
    }


@pytest.mark.parametrize("planned", ["by example", "in the first forward"])
def test_a_users_modules_keep_their_children(planned: str) -> None:
    model = network()
    before = children(model)
    prepare(model, "int8", example_inputs=X if planned == "by example" else None)
    for _ in range(2):
        model(X).sum().backward()
    assert children(model) == before
    assert [path for path, m in model.named_modules() if held_by(m)] == OWNERS
    pooling = model[1].branches[1]
    assert len(model) == 2
    assert len(model[0]) == 2
    assert len(list(pooling)) == 3
    assert list(model[0][1:]) == [model[0][1]]
    assert list(model.children()) == [model[0], model[1]]
    # Code that builds another model of the children runs too.
    assert nn.Sequential(*model.children())(X).shape == (2, 6, 8, 8)
    assert convert(model.eval(), X)


def test_a_root_may_be_a_container_with_calls_of_its_own() -> None:
    model = Residuals([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    prepare(model, "int8", example_inputs=X)
    model(X)
    assert len(model) == 2
    assert all(isinstance(layer, nn.Conv2d) for layer in model)
    fresh = Residuals([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    # Its plan comes with the state, while it is loaded.
    prepare(fresh, "int8")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(X), model.eval()(X))


def test_what_goes_through_all_parts_of_a_model_goes_through_them() -> None:
    model = network()
    prepare(model, LEARNED, example_inputs=X)
    found = {path: q for path, q in model.named_modules() if isinstance(q, ActivationQuantizer)}
    joins = {path: q for path, q in found.items() if "qat_joins" in path}
    assert len(joins) > 3
    assert all(model.get_submodule(path) is q for path, q in joins.items())
    learned = {id(p) for p in quantizer_parameters(model)}
    assert {id(q.half_width) for q in joins.values()} <= learned
    # An optimizer of a part gets what the part learns.
    part = {id(p) for p in model[0].parameters()}
    assert all((id(q.half_width) in part) == path.startswith("0.") for path, q in joins.items())
    model.eval()
    assert not any(q.training for q in joins.values())
    model.train().requires_grad_(False).to("meta")
    for q in joins.values():
        assert q.training
        assert not q.half_width.requires_grad
        assert q.half_width.is_meta
        assert q.min_val.is_meta
    visited: list[nn.Module] = []
    model.apply(visited.append)
    assert not set(visited) & set(joins.values())


def test_states_have_the_names_of_a_child_for_the_model_and_for_each_part() -> None:
    model, other = network(), network()
    for one in (model, other):
        prepare(one, "int8", example_inputs=X)
    model(X)
    state = model.state_dict()
    assert {"0.qat_joins.add_0_1.min_val", "1.qat_joins.cat_0_0._extra_state"} < state.keys()
    other.load_state_dict(state)
    assert torch.equal(other.eval()(X), model.eval()(X))
    part = model[0].state_dict()
    assert part.keys() == {k[2:] for k in state if k.startswith("0.")}
    network_of_parts = network()
    prepare(network_of_parts, "int8", example_inputs=X)
    network_of_parts[0].load_state_dict(part)
    assert torch.equal(
        network_of_parts[0].qat_joins["add_0_1"].max_val, part["qat_joins.add_0_1.max_val"]
    )
    kept = model.state_dict(keep_vars=True)["0.qat_joins.add_0_1.max_val"]
    assert kept is model[0].qat_joins["add_0_1"].max_val


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"0.qat_joins.mul_0_0.min_val": s["0.qat_joins.add_0_1.min_val"]}),
         r'Unexpected key\(s\) in state_dict: "0.qat_joins.mul_0_0.min_val"'),
        (lambda s: s.pop("0.qat_joins.add_0_1.min_val"),
         r'Missing key\(s\) in state_dict: "0.qat_joins.add_0_1.min_val"'),
    ],
    ids=["unexpected", "missing"],
)  # fmt: skip
def test_loading_is_strict_about_them(change: object, message: str) -> None:
    model = network()
    prepare(model, "int8", example_inputs=X)
    state = model.state_dict()
    assert callable(change)
    change(state)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)


def test_assigned_states_are_the_tensors_of_the_state() -> None:
    model = network()
    prepare(model, LEARNED, example_inputs=X)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert (
        model[0].qat_joins["add_0_1"].half_width.data_ptr()
        == state["0.qat_joins.add_0_1.half_width"].data_ptr()
    )


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_its_own(copied: object) -> None:
    model = network()
    prepare(model, LEARNED, example_inputs=X)
    model(X)
    assert callable(copied)
    twin = copied(model)
    assert torch.equal(twin.eval()(X), model.eval()(X))
    own = set(map(id, model.modules()))
    assert not any(id(m) in own for m in twin.modules())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert [path for path, _ in twin.named_modules()] == [path for path, _ in model.named_modules()]
    assert copied(model[0].qat_joins).keys() == model[0].qat_joins.keys()


def test_a_users_own_train_and_named_modules_are_called() -> None:
    class Frozen(Pooling):
        calls = 0

        def train(self, mode: bool = True) -> "Frozen":
            self.calls += 1
            super().train(mode)
            self[1].eval()
            return self

    model = nn.Sequential(Frozen(), nn.Conv2d(3, 3, 1))
    prepare(model, "int8", example_inputs=X)
    calls = model[0].calls
    assert model.train() is model
    assert model[0].calls == calls + 1
    assert not model[0][1].training
    assert model[0].qat_joins.training
