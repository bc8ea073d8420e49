"""Ranges see training batches and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.joins.apply import plan_of
from lightning_qat.training.range_sync import activation_quantizers
from tests.callback.tiny import Net, Planned, followed, largest, loader, qat, ranges


@pytest.mark.parametrize("eval_mode", [True, False], ids=["eval", "validates in train mode"])
def test_only_training_batches_reach_the_ranges(
    trainer: Callable[..., L.Trainer], eval_mode: bool
) -> None:
    class MonteCarlo(Net):
        def on_validation_model_eval(self) -> None:
            if eval_mode:
                super().on_validation_model_eval()

    def fit(**data: Any) -> list[tuple[float, float]]:
        L.seed_everything(1, verbose=False)
        net = MonteCarlo()
        run = trainer(qat(), num_sanity_val_steps=2)
        run.fit(net, loader(), **data)
        if data:
            run.test(net, loader(scale=100), verbose=False)
            run.predict(net, loader(scale=100))
        return ranges(net)

    with_validation = fit(val_dataloaders=loader(scale=100))
    # The first layer sees the data themselves: within the range of the training data.
    data = torch.cat([x for x, _ in loader()])
    assert with_validation[0][1] <= float(data.max()) < 100
    if eval_mode:
        # Batch norm, not the observer, learns from validation in train mode.
        assert with_validation == fit()


def test_the_range_is_the_mean_over_the_first_batches(trainer: Callable[..., L.Trainer]) -> None:
    net = Net()
    trainer(qat(), max_epochs=1).fit(net, loader())
    batches = [(float(x.min()), float(x.max())) for x, _ in loader()]
    # Of four batches, in float32 updates; those that are quantized widen it at once.
    expected = followed(batches)
    assert ranges(net)[0][:2] == pytest.approx(expected, rel=1e-6)


def test_non_finite_activations_name_the_layer(trainer: Callable[..., L.Trainer]) -> None:
    bad = loader()
    bad.dataset.tensors[0][9, 0, 0, 0] = torch.nan  # type: ignore[attr-defined]
    net = Net()
    with pytest.raises(
        ValueError,
        match=r"reached the input of 'conv', 'head', 'head.output_0_0', 'mean_0_0'\. The first of",
    ):
        trainer(qat()).fit(net, bad)
    # The ranges are those of the batch before.
    assert all(torch.isfinite(torch.tensor(ranges(net))).flatten())


class Loud(L.Callback):
    """Says where the gate stands at every hook of evaluation."""

    def __init__(self) -> None:
        self.open: list[bool] = []

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        self.open += [q.is_observing for q in activation_quantizers(pl_module).values()]

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start


def test_the_gate_is_closed_in_the_sanity_check_validation_test_and_prediction(
    trainer: Callable[..., L.Trainer],
) -> None:
    net, loud = Planned(), Loud()
    run = trainer(qat(), loud, num_sanity_val_steps=1, val_check_interval=2)
    run.fit(net, loader(), loader(scale=100))
    before = ranges(net)
    run.test(net, loader(scale=100), verbose=False)
    run.predict(net, loader(scale=100))
    # Last: within fit the gate opens again after validation.
    run.validate(net, loader(scale=100), verbose=False)
    # Four batches in each of four validations and three evaluations, and one in the sanity check.
    assert loud.open == [False] * (4 * 4 + 3 * 4 + 1) * len(before)
    # After fit nothing observes, whatever the mode.
    net.train()(torch.randn(4, 1, 6, 6) * 100)
    assert all(q.pending is None for q in activation_quantizers(net).values())
    assert ranges(net) == before


def test_a_model_summary_and_a_logged_graph_are_not_observed(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Graph(CSVLogger):
        def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
            # TensorBoard traces the model as it is, in train mode.
            model.train()(torch.full((2, 1, 6, 6), 1000.0))

    class Summed(Planned):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = torch.full((2, 1, 6, 6), 1000.0)

    net = Summed()
    net.bn.momentum = 0.0
    run = trainer(qat(), logger=Graph(tmp_path), enable_model_summary=True, log_every_n_steps=1)
    run.fit(net, loader())
    assert ranges(net)[0][1] <= largest(loader())


def test_a_model_summary_counts_the_operations_of_rows_of_a_weight(
    trainer: Callable[..., L.Trainer],
) -> None:
    # Lightning's FLOP counter asks each input of a module for its gradient, under no_grad, where a
    # view of a parameter requires one and has none.
    class Views(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = torch.zeros(2, 3, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.w = nn.Parameter(torch.randn(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x)[0]
            return F.linear(y @ self.w[:, :4], self.w.t()[:3, :4])

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return self(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    net, callback = Views(), qat()
    run = trainer(callback, enable_model_summary=True)
    run.fit(net, DataLoader(TensorDataset(torch.randn(8, 3, 8)), batch_size=4))
    assert callback.report is not None
    assert [layer.name for layer in callback.report.swapped] == ["attention"]
    assert run.global_step > 0


def test_the_plan_of_a_resumed_run_is_the_checkpoints(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    run, net = trainer(qat()), Net()
    run.fit(net, loader())
    run.save_checkpoint(tmp_path / "plan.ckpt")
    again = Net()
    callback = qat()
    trainer(callback, max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "plan.ckpt")
    assert plan_of(again) == plan_of(net)
    assert callback.report is not None
    assert callback.report.joins == plan_of(net)
