"""``ExampleInputs``: given, the module's own, or recorded from the first forward in training."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import onnx
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_qat.callback.example_inputs import MOST_SAMPLES, ExampleInputs
from lightning_qat.ir.quantized_model import QuantizedModel
from tests.callback import tiny


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


class Keywords(tiny.Net):
    """Takes a batch as a tokenizer gives it."""

    def forward(self, **batch: Any) -> Tensor:
        return super().forward(batch["x"])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(x=batch[0]), batch[1])


class Positional(tiny.Net):
    def forward(self, *args: Any) -> Tensor:
        return super().forward(args[0])


class Mixed(tiny.Net):
    def forward(self, x: Tensor, *others: Tensor, gain: float = 1.0, **more: Tensor) -> Tensor:
        return super().forward(x * gain + others[0] + more["shift"])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x, torch.zeros_like(x), gain=2.0, shift=x), y)


class NamedToo(tiny.Net):
    """One argument by position, the rest by keyword."""

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        return super().forward(x + more["shift"])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0], shift=batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Keywords, Positional, Mixed, NamedToo])
def test_a_call_with_any_arguments_is_replayed_as_it_was(
    trainer: Callable[..., L.Trainer], tmp_path: Path, kind: type[tiny.Net]
) -> None:
    callback = tiny.qat(exporters=["fake_quant_onnx"], export_dir=tmp_path)
    net = kind()
    trainer(callback).fit(net, tiny.loader())
    assert callback.delivered[0].error is None
    (file,) = tmp_path.glob("*.onnx")
    batches = {str(value.type.tensor_type.shape.dim[0]) for value in onnx.load(file).graph.input}
    # A dynamic dimension has a name instead of a size.
    assert all("dim_param" in batch for batch in batches)


def test_given_keyword_arguments_have_a_dynamic_batch_too(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    given = {"x": torch.zeros(2, 1, 6, 6)}
    callback = tiny.qat(
        exporters=["fake_quant_onnx"], export_dir=tmp_path, example_inputs=given, verify=False
    )
    trainer(callback).fit(Keywords(), tiny.loader())
    model = QuantizedModel.load(tmp_path / "keywords.pt2")
    assert model(x=torch.zeros(5, 1, 6, 6)).shape == (5, 3)


def test_a_fit_without_batches_exports_with_what_the_earlier_one_recorded(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = tiny.qat(exporters=["fake_quant_onnx"], export_dir=tmp_path)
    net, run = tiny.Net(), trainer(callback)
    run.fit(net, tiny.loader())
    first = QuantizedModel.load(tmp_path / "net.pt2").tensors.keys()
    run.fit(net, tiny.loader())
    assert callback.delivered[0].error is None
    assert QuantizedModel.load(tmp_path / "net.pt2").tensors.keys() == first
    assert copy.deepcopy(callback).example_inputs is None
