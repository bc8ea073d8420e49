"""``ExampleInputs``: given, the module's own, or recorded from the first forward in training."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_qat.callback.example_inputs import MOST_SAMPLES, ExampleInputs


class Net(L.LightningModule):
    def forward(self, x: Tensor, table: Any = None) -> Tensor:
        return x + 1


def test_a_list_of_ints_is_a_shape() -> None:
    assert ExampleInputs([2, 3]).given.shape == (2, 3)
    given = [torch.zeros(2), torch.zeros(3)]
    assert ExampleInputs(given).given is given


def test_given_inputs_win_over_the_module_s_own_and_over_a_recording() -> None:
    net = Net()
    inputs = ExampleInputs()
    inputs.recorded = (torch.zeros(3),)
    assert inputs.before_training(net) is None
    assert inputs.known(net) is not None
    net.example_input_array = torch.zeros(2)
    assert inputs.known(net).shape == (2,)
    assert ExampleInputs(torch.zeros(1)).known(net).shape == (1,)


def test_known_inputs_are_float32() -> None:
    given = {"x": torch.zeros(2, dtype=torch.float64), "index": torch.zeros(2, dtype=torch.int32)}
    known = ExampleInputs(given).known(Net())
    assert [known["x"].dtype, known["index"].dtype] == [torch.float32, torch.int32]


def test_the_first_forward_in_training_mode_is_recorded_with_few_samples() -> None:
    net, inputs = Net(), ExampleInputs()
    inputs.record(net)
    net.eval()(torch.zeros(2, 5))
    assert inputs.recorded is None
    batch, table = torch.zeros(MOST_SAMPLES + 1, 5), torch.zeros(7)
    net.train()(batch, table=table)
    net(torch.ones(2, 5))
    assert inputs.recording
    inputs.stop()
    assert not inputs.recording
    assert {k: v.shape[0] for k, v in inputs.recorded.items()} == {"x": MOST_SAMPLES, "table": 7}
    inputs.forget()
    assert inputs.recorded is None


def test_required_inputs_that_are_not_known_are_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"Net\.training_step"):
        ExampleInputs().required(Net())
