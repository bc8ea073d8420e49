"""The names of quantizers are keys of every checkpoint: they must never change."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_qat import prepare
from lightning_qat.layers import LSTMQAT, Conv2dQAT, LinearQAT
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.names import (
    INPUT,
    JOINS,
    PLAN,
    activation_quantizer_name,
    input_path,
    join_path,
    owner_path,
    place,
    quantizer_of_key,
    quantizer_role,
    tensor_key,
    weight_quantizer_name,
)


def test_the_checkpoint_format() -> None:
    assert (INPUT, JOINS, PLAN) == ("input_quantizer", "qat_joins", "_qat_plan")
    assert weight_quantizer_name("weight") == "weight_quantizer"
    assert weight_quantizer_name("weight_hr_l0") == "weight_quantizer_hr_l0"
    assert activation_quantizer_name("hidden", "_l1_reverse") == "hidden_quantizer_l1_reverse"
    assert (input_path("a.b"), input_path("")) == ("a.b.input_quantizer", "input_quantizer")
    assert join_path("a.b", "add", 0, 1) == "a.b.qat_joins.add_0_1"
    assert join_path("", "output", 2, 0) == "qat_joins.output_2_0"


@pytest.mark.parametrize(
    ("path", "owner", "key", "where"),
    [
        ("a.conv.input_quantizer", "a.conv", "a.conv.input", "a.conv"),
        ("input_quantizer", "", "input", "input_quantizer"),
        ("a.qat_joins.add_0_1", "a", "a.add_0_1", "a.add_0_1"),
        ("qat_joins.add_0_1", "", "add_0_1", "add_0_1"),
        ("a.hidden_quantizer_l0", "a", "a.hidden_l0", "a.hidden_quantizer_l0"),
    ],
)
def test_what_a_path_says(path: str, owner: str, key: str, where: str) -> None:
    assert (owner_path(path), tensor_key(path), place(path)) == (owner, key, where)
    assert quantizer_of_key(f"{path}._extra_state") == path
    assert quantizer_of_key(f"{path}.min_val") is None


def test_what_is_no_quantizer() -> None:
    for name in ("quantizer", "input_quantizers", "my_input_quantizer", "weight", ""):
        assert quantizer_role(name) is None
    assert quantizer_of_key("model._extra_state") is None
    assert quantizer_of_key("_extra_state") is None
    assert quantizer_of_key("_qat_plan") is None


class Net(nn.Module):
    """A recurrent layer, a convolution and a join."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.lstm = nn.LSTM(4, 3, num_layers=2, proj_size=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.lstm((x + self.conv(x)).flatten(1, 2))[0])


def test_every_quantizer_of_a_model_is_found_by_its_key() -> None:
    net: Any = Net()
    prepare(net, "int8", torch.zeros(1, 1, 4, 4))
    assert (type(net.conv), type(net.lstm), type(net.head)) == (Conv2dQAT, LSTMQAT, LinearQAT)
    state = net.state_dict()
    paths = {path for key in state if (path := quantizer_of_key(key)) is not None}
    assert paths == {key.rpartition(".")[0] for key in state if key.endswith("._extra_state")}
    assert len(paths) > 20
    for path in paths:
        quantizer = net.get_submodule(path)
        role = quantizer_role(path.rpartition(".")[2])
        if role is not None:
            assert (role == "activation") == isinstance(quantizer, ActivationQuantizer)
        net.get_submodule(owner_path(path))
