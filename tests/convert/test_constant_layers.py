"""Layers that depend on no input: files hold their results, and say so."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.verify import verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter
from tests.join_networks import train_steps


class PositionBias(nn.Module):
    """A network of positions beside a network of inputs, as in Swin V2, MaxViT and XCiT."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
        self.register_buffer("coordinates", torch.linspace(-1, 1, 18).reshape(9, 2))
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = 16 * torch.sigmoid(self.positions(self.coordinates))
        result: Tensor = self.last(F.relu(self.first(x))) + bias.view(1, 9, 4)
        return result


def converted(model: nn.Module, x: Tensor, **options: bool) -> QuantizedModel:
    prepare(model)
    train_steps(model, x)
    return convert(model.eval(), x, **options)


@pytest.fixture(scope="module")
def position_bias() -> tuple[nn.Module, QuantizedModel, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = PositionBias(), torch.randn(3, 9, 8)
        return model, converted(model, x), x


def test_a_network_of_positions_is_a_constant_of_the_values_that_were_trained(
    position_bias: tuple[nn.Module, QuantizedModel, Tensor],
) -> None:
    model, quantized, x = position_bias
    assert quantized.constant_layers == ("positions.0", "positions.2")
    assert [layer.name for layer in quantized.layers] == ["first", "last"]
    # The tensor that the join reads keeps its grid; what is before it is not computed any more.
    assert not any("sigmoid" in str(node.target) for node in quantized.program.graph.nodes)
    assert sum("add" in key for key in quantized.tensors) == 2
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=0)


def test_a_saved_model_says_which_layers_are_constants(
    position_bias: tuple[nn.Module, QuantizedModel, Tensor], tmp_path: Path
) -> None:
    _, quantized, x = position_bias
    quantized.save(tmp_path / "net.pt2")
    read = QuantizedModel.load(tmp_path / "net.pt2")
    assert read.constant_layers == quantized.constant_layers
    torch.testing.assert_close(read(x), quantized(x), rtol=0, atol=0)


@pytest.mark.parametrize("exporter", [CannExporter(), FakeQuantOnnxExporter()])
def test_files_differ_in_no_number_and_say_which_layers_are_constants(
    exporter: CannExporter | FakeQuantOnnxExporter,
    position_bias: tuple[nn.Module, QuantizedModel, Tensor],
    tmp_path: Path,
) -> None:
    _, quantized, x = position_bias
    artifact = export(quantized, exporter, tmp_path / "net")
    agreement = verify(quantized, artifact, (x,), exporter)
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1
    for name in quantized.constant_layers:
        assert (
            f"{name}: depends on no input, so files hold its result as a constant."
            in artifact.differences
        )


class CalledOnBoth(nn.Module):
    """One layer for a learned query and for the input."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.linspace(-1, 1, 8)[None])
        self.both, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.both(x) * self.both(self.query))
        return result


def test_a_layer_that_is_also_called_on_the_input_stays_a_layer() -> None:
    torch.manual_seed(0)
    model, x = CalledOnBoth(), torch.randn(4, 8)
    quantized = converted(model, x)
    assert quantized.constant_layers == ()
    assert [layer.name for layer in quantized.layers] == ["both", "last"]
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=0)


def test_weights_and_tables_that_no_layer_of_constants_reads_stay_integers() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.qkv = nn.Embedding(9, 8), nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            query = F.linear(x + self.table(torch.arange(9)), self.qkv.weight[:8])
            return query + self.qkv(x)[..., :8]

    torch.manual_seed(0)
    model, x = Reads(), torch.randn(2, 9, 8)
    quantized = converted(model, x)
    assert quantized.constant_layers == ()
    assert {"qkv.weight", "table.weight"} <= quantized.tensors.keys()
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=0)


def test_the_first_step_of_a_recurrent_layer_stays_although_its_state_is_a_constant() -> None:
    class LearnedState(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.last = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 2)
            self.state = nn.Parameter(torch.linspace(-1, 1, 18).reshape(1, 3, 6))

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.recurrent(x, self.state)
            result: Tensor = self.last(states[:, -1])
            return result

    torch.manual_seed(0)
    # One step: no other one needs the weight of its hidden state.
    model, x = LearnedState(), torch.randn(3, 1, 4)
    quantized = converted(model, x, dynamic_batch=False)
    assert quantized.constant_layers == ()
    assert [layer.name for layer in quantized.layers] == ["recurrent", "recurrent", "last"]
