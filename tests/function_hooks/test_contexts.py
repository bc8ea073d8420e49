"""Checkpointing, autocast, copies, empty batches: what surrounds a forward."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_qat.convert.convert import convert
from lightning_qat.joins.apply import plan_of
from lightning_qat.prepare.prepare import prepare
from lightning_qat.quantizers.activation import ActivationQuantizer
from tests.join_networks import NETWORKS, inputs_for, train_steps
from tests.joins.cases import PlainBlock, calibrated, the_plan

# The live model, wherever it runs


def called_quantizers(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    names = {model.get_submodule(t.quantizer): t.quantizer for t in the_plan(model).tensors}
    called: set[str] = set()
    handles = [m.register_forward_hook(lambda m, *_: called.add(names[m])) for m in list(names)]
    run()
    for handle in handles:
        handle.remove()
    return called


@pytest.mark.parametrize("network", ["resnet8", "encoder_block", "dense_block"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_model_computes_the_same_without_gradients(network: str, context: Any) -> None:
    x = inputs_for(network)
    model = calibrated(NETWORKS[network][0](), x)
    expected = model(x).detach()
    with context():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("network", ["resnet8", "encoder_block", "mobilenet_v3_block"])
def test_bf16_autocast_quantizes_the_same_tensors(network: str) -> None:
    x = inputs_for(network)
    model = calibrated(NETWORKS[network][0](), x)
    every = {t.quantizer for t in the_plan(model).tensors}
    expected = model(x).detach()
    found: list[Tensor] = []

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(x))

    assert called_quantizers(model, run) == every
    # bfloat16 has 8 bits of mantissa; a few of those per layer.
    span = float(expected.max() - expected.min())
    assert float((found[0].detach().float() - expected).abs().max()) < 0.15 * span
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    assert {q.min_val.dtype for q in quantizers} == {torch.float32}


class Checkpoints(nn.Module):
    def __init__(self, saves_memory: bool) -> None:
        super().__init__()
        self.saves_memory = saves_memory
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.saves_memory else block(x)
        return self.head(x.mean((2, 3)))


def test_activation_checkpointing_changes_neither_ranges_nor_gradients() -> None:
    plain = Checkpoints(False)
    saving = Checkpoints(True)
    saving.load_state_dict(plain.state_dict())
    batches = [torch.randn(4, 2, 6, 6) for _ in range(3)]
    for model in (plain, saving):
        prepare(model, "int8", batches[0])
        model.train()
        for x in batches:
            model.zero_grad()
            model(x).square().mean().backward()
    assert the_plan(plain).to_dict() == the_plan(saving).to_dict()
    for tensor in the_plan(plain).tensors:
        one, other = (m.get_submodule(tensor.quantizer) for m in (plain, saving))
        assert torch.equal(one.max_val, other.max_val), tensor.quantizer
        assert torch.equal(one.min_val, other.min_val), tensor.quantizer
    for (name, one), (_, other) in zip(
        plain.named_parameters(), saving.named_parameters(), strict=True
    ):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad), name


def test_a_plan_made_under_activation_checkpointing_waits_until_backward_is_through() -> None:
    plain, saving = Checkpoints(False), Checkpoints(True)
    saving.load_state_dict(plain.state_dict())
    batches = [torch.randn(4, 2, 6, 6) for _ in range(3)]
    for model in (plain, saving):
        prepare(model, "int8")
        model.train()
        for x in batches:
            model.zero_grad()
            model(x).square().mean().backward()
    assert the_plan(plain).to_dict() == the_plan(saving).to_dict()
    for tensor in the_plan(plain).tensors:
        one, other = (m.get_submodule(tensor.quantizer) for m in (plain, saving))
        assert torch.equal(one.max_val, other.max_val), tensor.quantizer
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_plan_that_waits_is_there_after_one_batch_for_convert_and_checkpoints() -> None:
    model, x = Checkpoints(True), torch.randn(4, 2, 6, 6)
    prepare(model, "int8")
    model.train()(x).square().mean().backward()
    assert plan_of(model) is None
    assert "_qat_plan" in model.state_dict()
    assert the_plan(model).tensors[-1].quantizer in dict(model.named_modules())
    other = Checkpoints(True)
    prepare(other, "int8")
    other.train()(x).square().mean().backward()
    assert convert(other, x).output_steps


def test_activation_checkpointing_in_eval_mode_changes_no_gradient() -> None:
    plain, saving = Checkpoints(False), Checkpoints(True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 2, 6, 6)
    gradients = []
    for model in (plain, saving):
        calibrated(model, x)
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("network", ["mobilenet_v3_block", "encoder_block", "dense_block"])
def test_a_copy_computes_the_same_with_quantizers_of_its_own(network: str, how: str) -> None:
    x = inputs_for(network)
    model = calibrated(NETWORKS[network][0](), x)
    twin = COPIES[how](model)
    expected = model(x).detach()
    assert torch.equal(twin(x), expected)
    assert the_plan(twin).to_dict() == the_plan(model).to_dict()
    every = {t.quantizer for t in the_plan(model).tensors}
    assert called_quantizers(twin, lambda: twin(x)) == every
    assert called_quantizers(model, lambda: twin(x)) == set()
    # Training the copy leaves the original alone.
    twin.train()
    twin(100 * x)
    assert torch.equal(model(x), expected)
    assert convert(twin.eval(), x).tensors.keys() == convert(model, x).tensors.keys()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_before_the_first_batch_is_planned_by_its_own(how: str) -> None:
    x = inputs_for("dense_block")
    model = NETWORKS["dense_block"][0]()
    prepare(model, "int8")
    twin = COPIES[how](model)
    train_steps(twin, x, steps=1)
    assert plan_of(twin) is not None
    assert plan_of(model) is None
    train_steps(model, x, steps=1)
    assert the_plan(twin).to_dict() == the_plan(model).to_dict()


@pytest.mark.parametrize("network", ["mobilenet_v3_block", "dense_block", "encoder_block", "unet"])
def test_an_empty_batch_passes_and_leaves_the_ranges_alone(network: str) -> None:
    x = inputs_for(network)
    model = calibrated(NETWORKS[network][0](), x)
    before = {
        n: (float(m.min_val), float(m.max_val))
        for n, m in model.named_modules()
        if isinstance(m, ActivationQuantizer)
    }
    for training in (False, True):
        model.train(training)
        for module in model.modules():
            # Batch norm has no statistics of nothing, quantized or not.
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert model(x[:0]).shape[0] == 0
    after = {
        n: (float(m.min_val), float(m.max_val)) for n, m in model.named_modules() if n in before
    }  # type: ignore[arg-type]
    assert after == before


def test_an_empty_first_batch_plans_what_a_full_one_does() -> None:
    x = inputs_for("encoder_block")
    model, other = NETWORKS["encoder_block"][0](), NETWORKS["encoder_block"][0]()
    for prepared, batches in ((model, (x[:0], x)), (other, (x,))):
        prepare(prepared, "int8")
        prepared.train()
        for batch in batches:
            prepared(batch)
    assert the_plan(model).to_dict() == the_plan(other).to_dict()
