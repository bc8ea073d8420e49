"""``Validation``: the same batches for every copy of a module, and not a word."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.callback.validation.validation import Validation


class Mean(L.LightningModule):
    """Logs the mean of its batches, and one weight times it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))

    def validation_step(self, batch: tuple[Tensor]) -> None:
        self.log("mean", batch[0].mean())
        self.log("weighted", self.weight * batch[0].mean(), logger=False)


class Numbers(L.LightningDataModule):
    """Random numbers, new ones in each ``setup``, in another order in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append("setup")
        self.data = TensorDataset(torch.randn(8))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        self.calls.append("val_dataloader")
        return DataLoader(self.data, batch_size=2, shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 100]

    def teardown(self, stage: str) -> None:
        self.calls.append("teardown")
        del self.data


@pytest.fixture
def numbers() -> Numbers:
    return Numbers()


def test_data_are_read_once_and_every_copy_sees_the_same_batches(numbers: Numbers) -> None:
    module = Mean()
    validation = Validation(module, numbers)
    first = validation.metric(module, "weighted", 2)
    twice = copy.deepcopy(module)
    twice.weight.data *= 2
    assert validation.metric(twice, "weighted", 2) == 2 * first
    assert validation.metric(module, "mean", 2) == first
    assert numbers.calls == ["prepare_data", "setup", "val_dataloader"]
    # The data module's own hooks run.
    assert 95 < first < 105


def test_random_numbers_outside_go_on_as_if_nothing_was(numbers: Numbers) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = [random.random(), np.random.rand(), float(torch.rand(()))]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    Validation(Mean(), numbers).metrics(Mean())
    assert [random.random(), np.random.rand(), float(torch.rand(()))] == expected


def test_nothing_is_shown_or_written(
    numbers: Numbers, capfd: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Validation(Mean(), numbers).metrics(Mean())
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def handler() -> Iterator[None]:
    """Whatever happens to the handler of Ctrl-C, it is as before."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handler")
def test_ctrl_c_is_an_interrupt_and_not_the_end_of_the_program(numbers: Numbers) -> None:
    class Interrupted(Mean):
        def validation_step(self, batch: tuple[Tensor]) -> None:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Validation(Mean(), numbers).metrics(Interrupted())
    assert signal.getsignal(signal.SIGINT) is before


def test_batches_are_those_that_the_step_is_given(numbers: Numbers) -> None:
    module = Mean()
    batches, metrics = Validation(module, numbers).batches(module, 3)
    assert len(batches) == 3
    assert metrics["mean"] == pytest.approx(float(torch.stack([b[0] for b in batches]).mean()))
