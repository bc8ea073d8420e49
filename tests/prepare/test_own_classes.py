"""Layers whose class is the user's: the class stays, and what it computes is quantized."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_qat import convert, export, prepare, verify
from lightning_qat.layers import Conv1dQAT, EmbeddingQAT, LinearQAT
from lightning_qat.prepare.prepare_like import prepare_like


class Initialized(nn.Linear):
    """It changes nothing but the initial weights, and has an attribute of its own."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs)
        nn.init.trunc_normal_(self.weight, std=0.2)
        self.lr_scale = 0.5

    def extra_repr(self) -> str:
        return "initialized"


class CausalConv(nn.Conv1d):
    """What audio models write: padding on the left only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class ScaledEmbedding(nn.Embedding):
    """As BART and T5 variants scale their word embeddings."""

    def forward(self, indices: Tensor) -> Tensor:
        return super().forward(indices) * self.embedding_dim**0.5


class PastPositions(nn.Embedding):
    """As BART's learned positions: an index that the module computes."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(torch.arange(tokens.shape[1]) + 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = ScaledEmbedding(10, 6), PastPositions(12, 6)
        self.conv, self.head = CausalConv(6, 6, 3), Initialized(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions(tokens)
        logits: Tensor = self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return logits


TOKENS = torch.randint(10, (3, 7), generator=torch.Generator().manual_seed(0))


def trained(model: Any) -> Any:
    torch.manual_seed(0)
    prepare(model, "int8", TOKENS)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_every_layer_is_quantized_and_stays_an_instance_of_its_class() -> None:
    model: Any = Net()
    parameters = list(model.parameters())
    report = prepare(model, "int8", TOKENS)
    assert [(s.name, s.kind) for s in report.swapped] == [
        ("words", "Embedding"),
        ("positions", "Embedding"),
        ("conv", "Conv1d"),
        ("head", "Linear"),
    ]
    assert report.skipped == ()
    kinds = [(ScaledEmbedding, EmbeddingQAT), (CausalConv, Conv1dQAT), (Initialized, LinearQAT)]
    for layer, both in zip((model.words, model.conv, model.head), kinds, strict=True):
        assert all(isinstance(layer, kind) for kind in both)
    assert model.head.lr_scale == 0.5
    assert repr(model.head).startswith("InitializedQAT(\n  initialized\n")
    own = (*model.words.parameters(), *model.positions.parameters(), *model.conv.parameters())
    assert all(a is b for a, b in zip(parameters, (*own, *model.head.parameters()), strict=True))


def test_its_own_forward_runs_and_reads_quantized_rows() -> None:
    model = trained(Net())
    layer = model.words
    weight, scale = layer.weight.detach(), layer.weight.detach().abs().amax(1, keepdim=True) / 127
    rows = (weight / scale).round().clamp(-127, 127) * scale
    assert torch.allclose(layer(TOKENS), rows[TOKENS] * 6**0.5, atol=1e-6)


@pytest.mark.parametrize("target", ["fake_quant_onnx", "cann"])
def test_files_compute_the_trained_model(target: str, tmp_path: Any) -> None:
    model = trained(Net())
    quantized = convert(model, TOKENS)
    assert torch.allclose(quantized(TOKENS), model(TOKENS), atol=1e-6)
    artifact = export(quantized, target, tmp_path / "net")
    # Deploy files add in float.
    assert all(text.startswith("add: ") for text in artifact.differences)
    agreement = verify(quantized, artifact, TOKENS)
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1


def test_it_is_copied_pickled_and_made_float_again() -> None:
    model = trained(Net())
    expected = model(TOKENS)
    assert torch.equal(copy.deepcopy(model)(TOKENS), expected)
    head = pickle.loads(pickle.dumps(model.head))
    assert type(head) is type(model.head)
    assert torch.equal(head.weight, model.head.weight)
    back = model.head.to_float()
    assert type(back) is Initialized
    assert {"weight", "bias"} <= set(back.state_dict())
    model.conv.unswap()
    assert type(model.conv) is CausalConv


def test_checkpoints_load_into_it_and_rebuild_it() -> None:
    model, again, float_model = trained(Net()), Net(), Net()
    prepare_like(again, model.state_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(TOKENS), model(TOKENS))
    missing, unexpected = float_model.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    assert all("quantizer" in key or "qat" in key for key in unexpected)


class Tampered(nn.Linear):
    """Its forward reads the weight in no product that could be quantized."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cumsum(self.weight, 0)[0]


def test_a_forward_that_never_quantizes_its_weight_makes_a_float_layer_of_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Tampered(4, 4))
    report = prepare(model, "int8", torch.randn(2, 4))
    assert [s.name for s in report.swapped] == ["0"]
    ((name, reason),) = [(s.name, s.reason) for s in report.skipped]
    assert name == "1"
    assert reason == "the exported forward never runs it, or never multiplies with its weight"
    assert type(model[1]) is Tampered


def test_without_a_plan_a_forward_of_its_own_stays_float_and_an_inherited_one_does_not() -> None:
    model = nn.Sequential(CausalConv(2, 2, 3), Initialized(5, 4))
    report = prepare(model, {"joins": False, "outputs": False})
    assert [s.name for s in report.swapped] == ["1"]
    assert report.skipped[0].reason == (
        "CausalConv.forward is its own, and what that multiplies is found by the plan of joins; "
        "the recipe has joins=False and outputs=False"
    )


def test_a_parametrized_layer_of_an_own_class_keeps_both() -> None:
    model: Any = nn.Sequential(parametrizations.weight_norm(Initialized(4, 3)))
    prepare(model, "int8", torch.randn(2, 4))
    assert isinstance(model[0], Initialized)
    assert isinstance(model[0], LinearQAT)
    assert isinstance(model[0].to_float(), Initialized)
    assert not isinstance(model[0].to_float(), LinearQAT)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]).__name__ == "InitializedQAT"
