"""The callback has each weight quantized once per optimizer step, whatever else happens."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_qat.quantizers.weight import WeightQuantizer
from tests.callback.tiny import BATCHES, Net, Planned, loader, qat, same


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every quantization of a weight, whether it was in training."""
    seen: list[bool] = []
    quantize = WeightQuantizer._fake_quantize

    def counted(self: WeightQuantizer, weight: Tensor, known: Any) -> Tensor:
        if known is None:
            seen.append(self.training)
        return quantize(self, weight, known)

    monkeypatch.setattr(WeightQuantizer, "_fake_quantize", counted)
    return seen


def test_once_per_optimizer_step_and_once_per_evaluation(
    trainer: Callable[..., L.Trainer], quantized: list[bool]
) -> None:
    run = trainer(qat(), max_epochs=3, accumulate_grad_batches=2, num_sanity_val_steps=0)
    run.fit(Net(), loader(), loader())
    # Two batches calibrate in float. Five optimizer steps and three evaluations are quantized, the
    # first of these in float too; two layers.
    assert quantized.count(True) == 2 * (3 * BATCHES // 2 - 1)
    assert quantized.count(False) == 2 * 3


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_the_same_to_the_bit(
    trainer: Callable[..., L.Trainer], accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(
                "lightning_qat.callback.phase_hooks.use_weight_cache", lambda *_: None
            )
        L.seed_everything(0, verbose=False)
        net = Planned()
        trainer(qat(), max_epochs=3, accumulate_grad_batches=accumulate).fit(net, loader())
        states.append(net.state_dict())
    assert same(*states)


def test_an_exchange_of_weights_that_torch_cannot_see_is_seen(
    trainer: Callable[..., L.Trainer],
) -> None:
    """As averages do it: through ``.data``, before and after an evaluation."""

    class Exchange(L.Callback):
        def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.conv.weight.data.mul_(2)

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.conv.weight.data.mul_(0.5)
            pl_module.after = pl_module(torch.ones(2, 1, 6, 6))

    class Watched(Planned):
        def validation_step(self, batch: list[Tensor]) -> None:
            found = self(batch[0])
            kept = self.conv.weight_quantizer.cache  # type: ignore[union-attr]
            self.conv.weight_quantizer.cache = None  # type: ignore[union-attr]
            assert torch.equal(found, self(batch[0]))
            self.conv.weight_quantizer.cache = kept  # type: ignore[union-attr]

    net = Watched()
    # After every batch: between the two that an optimizer step accumulates, too.
    run = trainer(
        *(qat(), Exchange()), max_epochs=2, val_check_interval=1, accumulate_grad_batches=2
    )
    run.fit(net, loader(), loader())
    assert torch.equal(net.eval()(torch.ones(2, 1, 6, 6)), net.after)  # type: ignore[arg-type]


def test_an_optimizer_that_writes_through_data_is_followed(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Old(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            closure()
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(parameter.grad.data, alpha=-0.1)

    class OldNet(Planned):
        def configure_optimizers(self) -> Any:
            return Old(self.parameters())

    class NewNet(Planned):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    nets: list[Net] = []
    for kind in (OldNet, NewNet):
        L.seed_everything(0, verbose=False)
        nets.append(kind())
        trainer(qat(), max_epochs=2).fit(nets[-1], loader())
    torch.testing.assert_close(nets[0].losses, nets[1].losses)
