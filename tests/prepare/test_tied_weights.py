"""Tied weights: one parameter, one weight quantizer, and one tensor in the file."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import convert, export, prepare, verify
from lightning_qat.prepare.prepare_like import prepare_like
from lightning_qat.quantizers.factory import quantizer_parameters

TOKENS = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))


class Decoder(nn.Module):
    """As GPT-2, T5 and BERT: the output layer has the table as its weight, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 11)
        self.decoder.weight = self.embed.weight
        # BERT's head has its bias under a second name.
        self.bias = self.decoder.bias

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.decoder(torch.relu(self.fc(self.embed(tokens))))
        return logits


def trained(recipe: Any = "int8") -> Any:
    torch.manual_seed(0)
    model = Decoder()
    prepare(model, recipe, TOKENS)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(TOKENS).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_both_layers_are_quantized_by_one_quantizer_and_stay_tied() -> None:
    model = Decoder()
    parameters = [id(p) for p in model.parameters()]
    report = prepare(model, "int8", TOKENS)
    assert [s.name for s in report.swapped] == ["embed", "fc", "decoder"]
    assert report.skipped == ()
    assert model.decoder.weight is model.embed.weight
    assert model.decoder.weight_quantizer is model.embed.weight_quantizer
    assert [id(p) for p in model.parameters()] == parameters


def test_the_gradient_of_the_parameter_is_that_of_both_readers() -> None:
    model: Any = Decoder()
    prepare(model, "int8", TOKENS)
    model(TOKENS).sum().backward()
    weight = model.embed.weight
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    table = ((weight.detach() / scale).round() * scale).requires_grad_()
    # Straight-through: as if the rounded table were the parameter.
    twin = Decoder()
    twin.load_state_dict(model.state_dict(), strict=False)
    hidden = torch.nn.functional.linear(table[TOKENS], model.fc.weight_quantizer(model.fc.weight))
    product = torch.relu(hidden + model.fc.bias) @ table.T
    product.sum().backward()
    assert table.grad is not None
    assert torch.allclose(weight.grad, table.grad, atol=0.35)


def test_learned_scales_of_a_tied_weight_are_one_parameter() -> None:
    model: Any = trained({"weight": {"quantizer": "learned"}})
    scales = quantizer_parameters(model, "weights")
    assert len(scales) == 2
    assert scales[0] is model.decoder.weight_quantizer.half_width
    quantized = convert(model, TOKENS)
    assert torch.allclose(quantized(TOKENS), model(TOKENS), atol=1e-6)


def test_a_checkpoint_names_it_twice_and_loads() -> None:
    model, again = trained(), Decoder()
    state = model.state_dict()
    assert torch.equal(state["embed.weight"], state["decoder.weight"])
    prepare_like(again, state)
    again.load_state_dict(state)
    assert again.decoder.weight is again.embed.weight
    assert again.decoder.weight_quantizer is again.embed.weight_quantizer
    assert torch.equal(again.eval()(TOKENS), model(TOKENS))


@pytest.mark.parametrize("target", ["fake_quant_onnx", "cann"])
def test_files_compute_the_trained_model(target: str, tmp_path: Any) -> None:
    model = trained()
    quantized = convert(model, TOKENS)
    tensors = [quantized.tensors[f"{name}.weight"].integers for name in ("embed", "decoder")]
    first, second = tensors
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    artifact = export(quantized, target, tmp_path / "net")
    assert artifact.differences == ()
    agreement = verify(quantized, artifact, TOKENS)
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1


def test_different_grids_for_one_weight_stay_two_quantizers() -> None:
    model: Any = Decoder()
    prepare(model, {"overrides": {"decoder": {"weight": {"bits": 4}}}}, TOKENS)
    assert model.decoder.weight_quantizer is not model.embed.weight_quantizer
    assert model.decoder.weight_quantizer.spec.bits == 4


def test_a_tied_weight_that_one_layer_keeps_float_is_quantized_by_the_other() -> None:
    model: Any = Decoder()
    report = prepare(model, {"exclude": ["embed"]}, TOKENS)
    assert [s.name for s in report.swapped] == ["fc", "decoder"]
    assert type(model.embed) is nn.Embedding
