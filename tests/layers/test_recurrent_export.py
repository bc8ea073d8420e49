"""Recurrent layers converted and exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_qat import QuantizedModel, Recipe, convert, export, verify
from lightning_qat.convert.capture import CaptureError
from lightning_qat.ir.ops import as_dequantize, as_fake_quantize
from lightning_qat.recipe.specs import WeightSpec
from tests.layers.recurrent_cases import (
    FEATURES,
    HIDDEN,
    KINDS,
    Tagger,
    float_layer,
    trained,
)
from tests.models import EVERY_LAYER

# torch's own remark on its float LSTM.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


STEPS = 3
"""Unrolled in every file: one that reads the state that is given, and two of the others."""


# Final numbers and files


def converted(kind: str, recipe: Any = "int8", **options: Any) -> tuple[nn.Module, QuantizedModel]:
    x = torch.randn(4, STEPS, FEATURES)
    model = trained(Tagger(kind, **options), x, recipe=recipe)
    return model, convert(model, x)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_is_the_model(kind: str, options: dict[str, Any]) -> None:
    model, quantized = converted(kind, **options)
    # The batch stays dynamic.
    x = torch.randn(7, STEPS, FEATURES)
    torch.testing.assert_close(quantized(x), model(x))
    rnn: Any = model.rnn
    for name in rnn.weight_names(rnn):
        quantizer = getattr(rnn, name.replace("weight", "weight_quantizer"))
        found = quantized.tensors[f"rnn.{name}"]
        assert found.qparams.equal(quantizer.qparams(getattr(rnn, name)))
    hidden = rnn.hidden_quantizer_l0
    assert quantized.tensors["rnn.hidden_l0"].qparams.equal(hidden.qparams())


def test_each_weight_is_one_node_and_each_step_one_of_the_same_tensor() -> None:
    _, quantized = converted("lstm projected", num_layers=2)
    nodes = quantized.program.graph.nodes
    weights = [call.key for call in map(as_dequantize, nodes) if call is not None]
    assert len(weights) == len(set(weights)) == 6 + 3
    activations = [call.key for call in map(as_fake_quantize, nodes) if call is not None]
    for layer in ("l0", "l1"):
        assert activations.count(f"rnn.hidden_{layer}") == STEPS
        assert activations.count(f"rnn.projection_{layer}") == STEPS
    assert activations.count("rnn.input") == activations.count("rnn.input_l1") == 1


def test_layers_of_a_converted_model_are_its_matmuls() -> None:
    model, quantized = converted("gru")
    rnn: Any = model.rnn
    found = [call for call in quantized.layers if call.name == "rnn"]
    assert [(call.input_key, call.weight_key) for call in found] == [
        ("rnn.input", "rnn.weight_ih_l0"),
        *[("rnn.hidden_l0", "rnn.weight_hh_l0")] * STEPS,
    ]
    assert found[0].bias is not None
    assert torch.equal(found[0].bias, rnn.bias_ih_l0)
    assert all(c.bias is not None and torch.equal(c.bias, rnn.bias_hh_l0) for c in found[1:])


def test_another_length_is_refused_and_the_reason_given() -> None:
    _, quantized = converted("lstm")
    with pytest.raises(ValueError, match=r"size\(\)\[1\] == 3. A recurrent layer's steps are unr"):
        quantized(torch.randn(4, STEPS + 1, FEATURES))


@pytest.mark.parametrize("batch", [1, 2, STEPS])
def test_the_batch_is_dynamic_where_time_comes_first(batch: int) -> None:
    x = torch.randn(STEPS, batch, FEATURES)
    model = trained(Tagger(batch_first=False), x)
    quantized = convert(model, x)
    more = torch.randn(STEPS, 8, FEATURES)
    torch.testing.assert_close(quantized(more), model(more))


class Streaming(nn.Module):
    """Takes and gives the state, as a device that runs step by step does."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, HIDDEN, 2, batch_first=batch_first)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, (h, c) = self.rnn(x, (h, c))
        return output, h, c


@pytest.mark.parametrize(
    # 2 is the number of layers as well, and 4 the size of the state.
    ("batch", "batch_first"),
    [(1, True), (2, True), (2, False), (4, False)],
)
def test_a_state_s_batch_is_dynamic_too(batch: int, batch_first: bool, tmp_path: Path) -> None:
    def inputs(size: int) -> tuple[Tensor, ...]:
        x = torch.randn(STEPS, size, FEATURES)
        x = x.transpose(0, 1) if batch_first else x
        return x.contiguous(), torch.randn(2, size, HIDDEN), torch.randn(2, size, HIDDEN)

    model = trained(Streaming(batch_first), *inputs(batch))
    quantized = convert(model, inputs(batch))
    more = inputs(7)
    for found, expected in zip(quantized(*more), model(*more), strict=True):
        torch.testing.assert_close(found, expected)
    agreement = verify(quantized, export(quantized, "fake_quant_onnx", tmp_path / "net"), more)
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1


class Packing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(FEATURES, HIDDEN, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.rnn(packed)[1]


def test_a_packed_sequence_trains_but_is_refused_by_convert() -> None:
    inputs = torch.randn(3, STEPS, FEATURES), torch.tensor([3, 2, 1])
    model = trained(Packing(), *inputs)
    with pytest.raises(CaptureError, match=r"(?s)'rnn' \(GRUQAT\).*must get padded sequences"):
        convert(model, inputs)


class Encoder(nn.Module):
    """A recurrent layer and a head over all steps; takes (batch, time, 3)."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.rnn = float_layer(kind, batch_first=True, **options)
        width = (self.rnn.proj_size or HIDDEN) * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize(
    ("options", "granularity"),
    [({}, "per_tensor"), ({"num_layers": 2, "bidirectional": True}, "per_channel")],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_files_compute_what_torch_does_at_every_step(
    kind: str, options: dict[str, Any], granularity: Any, tmp_path: Path
) -> None:
    # Without joins, so that errors of the recurrent layer are not rounded away.
    recipe = Recipe(WeightSpec(granularity=granularity), joins=False, outputs=False)
    x = torch.randn(4, STEPS, FEATURES)
    quantized = convert(trained(Encoder(kind, **options), x, recipe=recipe), x)
    more = torch.randn(6, STEPS, FEATURES)
    # Steps are 1/255 of the output's range; the biases that CANN rounds to its accumulators' grids
    # may move a rounding. One translation serves both.
    for target, most in {"fake_quant_onnx": 1e-4, "cann": 0.01}.items():
        agreement = verify(quantized, export(quantized, target, tmp_path / target), more)
        assert agreement.parameters_equal, agreement
        assert agreement.runtimes[0].max_steps / 255 <= most, agreement


@pytest.mark.parametrize("recipe", ["w4a8", "w4a4", "amct"])
def test_other_recipes_are_exported_too(recipe: str, tmp_path: Path) -> None:
    x = torch.randn(4, STEPS, FEATURES)
    quantized = convert(trained(Encoder("lstm"), x, recipe=EVERY_LAYER.get(recipe, recipe)), x)
    for target in ("fake_quant_onnx", "cann"):
        agreement = verify(quantized, export(quantized, target, tmp_path / target))
        assert agreement.parameters_equal, agreement


def test_it_can_be_saved_and_loaded(tmp_path: Path) -> None:
    _, quantized = converted("gru", num_layers=2)
    quantized.save(tmp_path / "model.pt2")
    loaded, x = QuantizedModel.load(tmp_path / "model.pt2"), torch.randn(2, STEPS, FEATURES)
    assert torch.equal(loaded(x), quantized(x))
    assert loaded.tensors.keys() == quantized.tensors.keys()
