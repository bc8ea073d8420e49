"""Which recurrent layers a converted model says that it has."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import QuantizedModel, convert, prepare
from lightning_qat.ir.exported_program import module_path
from lightning_qat.ir.recurrence import Recurrence

EARLIER = Path(__file__).parents[1] / "goldens/earlier_version/recurrent.pt2"


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y, _ = self.lstm(x, (torch.zeros_like(c), c))
        output: Tensor = self.gru(y)[0]
        return output


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    net, inputs = Tagger(), (torch.randn(2, 2, 3), torch.randn(4, 2, 4))
    prepare(net, "int8", example_inputs=inputs)
    with torch.no_grad():
        net.train()(*inputs)
    return convert(net.eval(), inputs, dynamic_batch=False)


def test_a_model_lists_its_recurrent_layers_with_their_initial_cells(
    model: QuantizedModel,
) -> None:
    lstm, gru = model.recurrences
    assert (lstm.name, lstm.kind, gru) == ("lstm", "LSTM", Recurrence("gru", "GRU"))
    nodes = {node.name: node for node in model.program.graph.nodes}
    # Two layers with two directions each read one part of the cell state that was given.
    cells = [nodes[name] for name in lstm.initial_cells]
    assert [cell.args for cell in cells] == [(nodes["c"], 0, part) for part in range(4)]
    assert not any("initial_cell" in name for name in nodes)


def test_a_layer_s_nodes_are_those_of_its_own_forward(model: QuantizedModel) -> None:
    for recurrence in model.recurrences:
        nodes = recurrence.nodes(model.program)
        assert {module_path(node) for node in nodes} == {recurrence.name}
        assert torch.ops.aten.sigmoid.default in {node.target for node in nodes}


def test_the_list_is_saved_and_loaded(model: QuantizedModel, tmp_path: Path) -> None:
    model.save(tmp_path / "model.pt2")
    loaded = QuantizedModel.load(tmp_path / "model.pt2")
    assert loaded.recurrences == model.recurrences
    names = {node.name for node in loaded.program.graph.nodes}
    assert set(loaded.recurrences[0].initial_cells) <= names


def test_it_is_found_in_a_file_of_an_earlier_version_that_does_not_list_it() -> None:
    loaded = QuantizedModel.load(EARLIER)
    (lstm,) = loaded.recurrences
    assert (lstm.name, lstm.kind) == ("rnn", "LSTM")
    nodes = {node.name: node for node in loaded.program.graph.nodes}
    # One layer with two directions, without a given state.
    cells = [nodes[name].target for name in lstm.initial_cells]
    assert cells == [torch.ops.aten.new_zeros.default] * 2
