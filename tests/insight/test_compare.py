"""Two models compared tensor by tensor."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_qat import compare, convert, export, prepare
from lightning_qat.export.protocol import Artifact
from lightning_qat.numerics.arithmetic import dequantize, quantize
from lightning_qat.numerics.qparams import QParams
from tests.models import ResidualAdd, linear


def trained(model: nn.Module, *x: Tensor) -> nn.Module:
    prepare(model, "int8", x)
    model.train()(*x)
    return model.eval()


def decibels(real: Tensor, quantized: Tensor) -> float:
    real, quantized = real.double(), quantized.double()
    ratio = real.square().sum() / (real - quantized).square().sum()
    return 10 * math.log10(float(ratio))


# A prepared model and its own float weights


def test_errors_are_those_of_a_formula_written_by_hand() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    model = trained(linear(), x)
    first, _, last = model
    weight, bias = first.weight.detach(), first.bias.detach()
    q_in, q_mid = (layer.input_quantizer.qparams() for layer in (first, last))

    def on_grid(tensor: Tensor, numbers: QParams) -> Tensor:
        grid = numbers.scale, numbers.zero_point
        return dequantize(quantize(tensor, *grid, numbers.grid), *grid)

    step = weight.abs().amax(1, keepdim=True) / 127
    quantized_weight = (weight / step).round().clamp(-127, 127) * step
    float_mid = torch.relu(x @ weight.T + bias)
    quantized_mid = on_grid(torch.relu(on_grid(x, q_in) @ quantized_weight.T + bias), q_mid)

    comparison = compare(model, None, x)
    by_name = {tensor.name: tensor for tensor in comparison.tensors}
    middle = by_name["2.input"].total
    assert middle is not None
    assert middle.sqnr_db == pytest.approx(decibels(float_mid, quantized_mid), abs=0.05)
    weights = {row.name: row.total for row in comparison.weights}
    assert weights["0.weight"] is not None
    assert weights["0.weight"].sqnr_db == pytest.approx(
        decibels(weight, quantized_weight), abs=0.01
    )


def test_noise_that_grows_is_told_from_a_layer_that_is_wrong() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
    trained(model, x)
    quantizer = model[1].input_quantizer
    quantizer.min_val.fill_(-100.0)
    quantizer.max_val.fill_(100.0)
    quantizer.range_changed()
    by_name = {tensor.name: tensor for tensor in compare(model, None, x).tensors}
    wrong, after = by_name["1.input"], by_name["4.input"]
    assert wrong.own == wrong.total or (wrong.own and wrong.own.sqnr_db < 10)
    assert after.own is not None
    assert after.total is not None
    # What comes after it is wrong because it is.
    assert after.own.sqnr_db > after.total.sqnr_db + 20


def test_a_layer_made_fragile_is_the_worst() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
    trained(model, x)
    # Its range holds a hundred times what passes: one or two steps are left.
    quantizer = model[4].input_quantizer
    quantizer.min_val.fill_(-100.0)
    quantizer.max_val.fill_(100.0)
    quantizer.range_changed()
    comparison = compare(model, None, x)
    assert comparison.worst[0].name == "4.input"
    use = comparison.worst[0].use
    assert use is not None
    assert use.unused > 0.97


def test_a_model_is_not_changed() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4, 6, 6)
    model = trained(ResidualAdd(), x).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compare(model, None, x)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_run_of_a_shared_layer_has_a_row() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(torch.relu(self.shared(x)))

    x = torch.randn(8, 6)
    names = [tensor.name for tensor in compare(trained(Twice(), x), None, x).tensors]
    assert len(names) == len(set(names)) == 3


def test_an_output_that_is_not_quantized_is_compared_as_well() -> None:
    x = torch.randn(8, 6)
    model = linear()
    prepare(model, {"outputs": False}, x)
    model.train()(x)
    comparison = compare(model.eval(), None, x)
    last = comparison.tensors[-1]
    assert last.name == "output 0"
    assert last.total is not None
    assert 0 < last.total.max_steps < 20


def test_a_collapsed_range_is_seen_in_what_is_clipped() -> None:
    x = torch.randn(64, 6)
    model = trained(linear(), x)
    quantizer = model[0].input_quantizer
    quantizer.min_val.fill_(-0.1)
    quantizer.max_val.fill_(0.1)
    quantizer.range_changed()
    use = {tensor.name: tensor.use for tensor in compare(model, None, x).tensors}["0.input"]
    assert use is not None
    assert use.clipped == pytest.approx(float((x.abs() > 0.1).float().mean()), abs=0.02)


# A float model


def test_a_float_model_is_compared_by_its_own_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    start = linear()
    model = linear()
    model.load_state_dict(start.state_dict())
    trained(model, x)
    same = compare(model, start, x)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    moved = compare(model, start, x)
    assert "the float Sequential" in str(moved)
    ratios = [{w.name: w.total for w in c.weights}["0.weight"] for c in (same, moved)]
    assert ratios[0] is not None
    assert ratios[1] is not None
    assert ratios[0].sqnr_db > 40
    # Noise of half the signal.
    assert ratios[1].sqnr_db == pytest.approx(20 * math.log10(1 / 0.5), abs=0.1)


def test_a_converted_model_is_compared_with_the_float_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 6, 6)
    model = trained(ResidualAdd(), x)
    real = ResidualAdd().eval()
    real.load_state_dict({k: v for k, v in model.state_dict().items() if k in real.state_dict()})
    comparison = compare(convert(model, x), real, x)
    names = [tensor.name for tensor in comparison.tensors]
    assert names[0] == "conv1.input"
    assert "head.input" in names
    assert all(t.total is not None and t.total.sqnr_db > 15 for t in comparison.tensors)
    assert not comparison.weights


def test_a_float_model_of_other_parameters_is_refused_by_name() -> None:
    x = torch.randn(4, 6)
    model = trained(linear(), x)
    with pytest.raises(ValueError, match=r"must have the parameters .* 2 are unknown .* 7\.weight"):
        compare(model, nn.Sequential(*(nn.Identity() for _ in range(7)), nn.Linear(6, 5)), x)


# The result


def test_the_result_is_plain_json() -> None:
    x = torch.zeros(4, 6)
    plain = compare(trained(linear(), torch.randn(8, 6)), None, x).to_dict()
    # Zeros are exact: an infinite ratio is no JSON number.
    assert json.loads(json.dumps(plain, allow_nan=False))["tensors"][0]["total"]["sqnr_db"] is None


def test_what_cannot_be_compared_is_refused() -> None:
    x = torch.randn(4, 6)
    model = trained(linear(), x)
    with pytest.raises(ValueError, match="inputs must be what forward takes"):
        compare(model)
    with pytest.raises(TypeError, match="takes a converted model"):
        compare(model, Artifact("cann", {}), x)
    with pytest.raises(TypeError, match="Artifact that export returned or with a float"):
        compare(convert(model, x))
    with pytest.raises(ValueError, match="has no QAT layers"):
        compare(linear(), None, x)


def test_a_target_that_shows_nothing_is_named() -> None:
    class Silent:
        name = "silent"

        def check_available(self) -> None: ...

        def export(self, model: object, path_prefix: object) -> Artifact:
            return Artifact("silent", {})

    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"'silent' must show the tensors .* has no method trace"):
        compare(convert(trained(linear(), x), x), Artifact("silent", {}), x, exporter=Silent())


def test_several_inputs_and_nested_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            left, right = self.left(a), self.right(b)
            return {"sum": left + right, "both": torch.cat((left, right), 1)}

    a, b = torch.randn(8, 6), torch.randn(8, 6)
    model = trained(Two(), a, b)
    quantized = convert(model, (a, b))
    assert len(compare(model, None, (a, b)).tensors) >= 4
    artifact = export(quantized, "fake_quant_onnx", tmp_path / "two")
    comparison = compare(quantized, artifact, (a, b))
    assert comparison.departure is None
    assert comparison.judgement == "Every layer computes what the model does."
    assert not np.isnan([t.own.mse for t in comparison.tensors if t.own]).any()


def test_a_quantized_tensor_that_is_sliced_and_read_again_has_the_same_rows() -> None:
    class Pooler(nn.Module):
        """As BERT's: its first token is read again by a quantizer of the whole sequence."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.dense = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.norm(self.dense(x) + x)
            return hidden, torch.tanh(self.dense(hidden[:, 0]))

    x = torch.randn(4, 5, 8)
    comparison = compare(trained(Pooler(), x), None, x)
    assert all(t.own is not None and t.own.sqnr_db > 20 for t in comparison.tensors)
