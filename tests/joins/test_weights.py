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
from lightning_qat.quantizers.weight import WeightQuantizer


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


class Recorded(nn.Module):
    """A layer whose weight is read instead of the layer being called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 12, bias=False), nn.Linear(4, 4)
        self.q, self.v = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("k", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        # EVA-02 and BEiT: no bias for the keys.
        bias = torch.cat((self.q, self.k, self.v))
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return self.head(q * k + v)


class TransposedLinear(nn.Module):
    """``Conv1D`` of GPT-2, as transformers writes it: the weight is ``(in, out)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.3)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], -1)


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = TransposedLinear(6, 8), TransposedLinear(8, 4)
        self.ln = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc(self.ln(x))))


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


def weights(model: nn.Module) -> dict[str, WeightQuantizer]:
    """Those that no layer has."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, WeightQuantizer)}
    return {name: m for name, m in found.items() if not name.endswith("weight_quantizer")}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Product, ["qat_joins.matmul_0_weight"]),
        (LoRA, ["qat_joins.matmul_0_weight", "qat_joins.matmul_1_weight"]),
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


def test_a_weight_has_a_scale_per_output_channel_and_follows_the_parameter() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    model = trained(Product(), x)
    for factor in (1, 3):
        with torch.no_grad():
            model.w.mul_(factor)
        # One per column of x @ w; nothing is averaged, and nothing freezes.
        tensor = convert(model, x).tensors["matmul_0_weight"]
        scale = model.w.detach().abs().amax(0) / 127
        assert tensor.kind == "weight"
        assert torch.allclose(tensor.qparams.scale, scale, rtol=1e-6)
        # Files hold it as a linear layer's: (out, in).
        assert tensor.integers is not None
        expected = (model.w.detach() / scale).round().T
        assert torch.equal(tensor.integers.float(), expected)


@pytest.mark.parametrize("target", ["fake_quant_onnx", "cann", "tflite"])
@pytest.mark.parametrize("kind", [Product, LoRA, Recorded, GPT])
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
    assert agreement.parameters_equal, str(agreement)
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


def test_a_layer_that_is_read_is_quantized_by_its_own_quantizers() -> None:
    x = torch.randn(32, 6)
    model = trained(Recorded(), x)
    plan = plan_of(model)
    assert plan is not None
    assert plan.unreached == ()
    assert weights(model) == {}
    quantized = convert(model, x)
    assert [layer.name for layer in quantized.layers] == ["qkv", "head"]
    # The concatenated bias is a constant of the layer.
    bias = quantized.layers[0].bias
    assert bias is not None
    assert torch.equal(bias, torch.cat((model.q, model.k, model.v)).detach())
    assert {"qkv.input", "qkv.weight"} <= set(quantized.tensors)


def test_learned_scales_serve_a_layer_that_is_read() -> None:
    x = torch.randn(8, 6)
    model: Any = Recorded()
    prepare(model, {"weight": {"quantizer": "learned"}}, x)
    model(x).square().mean().backward()
    assert model.qkv.weight_quantizer.half_width.grad is not None


@pytest.mark.parametrize("way", ["forward", "super()._conv_forward"])
def test_a_standardised_convolution_is_a_layer_with_the_weight_of_the_formula(
    way: str, tmp_path: Any
) -> None:
    torch.manual_seed(0)

    class Centred(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            weight = weight - weight.mean((1, 2, 3), keepdim=True)
            return super()._conv_forward(x, weight, bias)

    kind = WeightStandardized if way == "forward" else Centred
    x = torch.randn(8, 1, 6, 6)
    model = trained(nn.Sequential(kind(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)), x)
    quantized = convert(model, x)
    weight = model[0].weight.detach().double()
    expected = weight - weight.mean((1, 2, 3), keepdim=True)
    if way == "forward":
        expected = expected / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
    tensor = quantized.tensors["0.weight"]
    scale = expected.flatten(1).abs().amax(1) / 127
    assert np.allclose(tensor.qparams.scale, scale, rtol=1e-5)
    assert tensor.integers is not None
    integers = expected / scale.reshape(-1, 1, 1, 1)
    assert (tensor.integers - integers).abs().max() <= 0.5 + 1e-3
    artifact = export(quantized, "fake_quant_onnx", tmp_path / "net")
    assert artifact.differences == ()
    agreement = verify(quantized, artifact, x)
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1


class Blur(nn.Module):
    """A fixed filter, as anti-aliased networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        row = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("filter", (row[:, None] * row / 16)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return F.conv2d(x, self.filter.expand(x.shape[1], 1, 3, 3), groups=x.shape[1], stride=2)


def test_a_filter_in_a_buffer_is_a_weight() -> None:
    x = torch.randn(2, 1, 8, 8)
    model = trained(Blur(), x)
    tensor = convert(model, x).tensors["conv2d_0_weight"]
    assert tensor.kind == "weight"
    assert torch.allclose(tensor.qparams.scale, torch.full((2,), 0.25 / 127))


class Transposed(nn.Module):
    """Grouped, with channels on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)
        self.up = nn.Parameter(torch.randn(4, 3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(self.conv(x), self.up, stride=2, groups=2)


def test_a_grouped_transposed_convolution_has_a_scale_per_channel_of_each_group(
    tmp_path: Any,
) -> None:
    x = torch.randn(2, 1, 4, 4)
    model = trained(Transposed(), x)
    quantized = convert(model, x)
    scale = quantized.tensors["conv_transpose2d_0_weight"].qparams.scale
    rows = model.up.detach().reshape(2, 2, 3, 4).abs().amax((1, 3)).flatten() / 127
    assert torch.allclose(scale, rows, rtol=1e-6)
    artifact = export(quantized, "fake_quant_onnx", tmp_path / "net")
    assert verify(quantized, artifact, x).max_steps <= 1


class TiedHead(nn.Module):
    """The table of an embedding is the weight of a product: ``F.linear(x, self.embed.weight)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.relu(self.fc(self.embed(tokens))), self.embed.weight)


def test_an_embedding_that_a_product_reads_has_one_weight_quantizer() -> None:
    tokens = torch.randint(9, (3, 5))
    model: Any = TiedHead()
    prepare(model, "int8", tokens)
    plan = plan_of(model)
    assert plan is not None
    (calls,) = [calls for path, calls in plan.sites.items() if any(calls.values())]
    linear = next(operands for call, operands in calls.items() if call.startswith("linear"))
    assert linear["1"] == "embed.weight_quantizer"
    model(tokens).sum().backward()
    model.eval()
    quantized = convert(model, tokens)
    assert torch.allclose(quantized(tokens), model(tokens), atol=1e-6)
    assert [key for key, t in quantized.tensors.items() if t.kind == "weight"] == [
        "embed.weight",
        "fc.weight",
    ]


def test_a_resumed_plan_has_its_weight_quantizers() -> None:
    x = torch.randn(8, 6)
    model, again = trained(GPT(), x), GPT()
    prepare(again, "int8")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert list(weights(again)) == ["fc.qat_joins.addmm_0_weight", "out.qat_joins.addmm_0_weight"]


def test_compiled_products_are_those_of_the_plain_model() -> None:
    x = torch.randn(8, 6)
    model = trained(GPT(), x).eval()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
