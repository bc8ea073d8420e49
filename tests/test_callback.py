"""QATCallback in real, tiny trainers."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import CaptureError, QATCallback, Recipe, Schedule, load_qat_checkpoint, prepare
from lightning_qat.callback_checks import environment_problems
from lightning_qat.export import Artifact, MissingDependency
from lightning_qat.layers import Conv2dQAT, LinearQAT
from lightning_qat.phases import activation_quantizers
from lightning_qat.quantized_model import QuantizedModel

BATCHES = 4
"""Batches per epoch: 32 samples in batches of 8."""


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor]) -> None:
        self.validation_step(batch)

    def predict_step(self, batch: list[Tensor]) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def loader(scale: float = 1.0, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * BATCHES, 1, 6, 6, generator=generator) * scale
    y = torch.randint(0, 3, (8 * BATCHES,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    def make(*callbacks: L.Callback, **options: Any) -> L.Trainer:
        defaults: dict[str, Any] = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return make


class Phases(L.Callback):
    """Writes down what holds during every training batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool, bool]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        quantizer = next(iter(activation_quantizers(pl_module).values()))
        bn = pl_module.bn
        assert isinstance(bn, nn.BatchNorm2d)
        self.seen.append((quantizer.observing, quantizer.quantizing, not bn.training))


def ranges(module: nn.Module) -> list[tuple[float, float]]:
    return [(float(q.min_val), float(q.max_val)) for q in activation_quantizers(module).values()]


# ---------------------------------------------------------------------- phases


def test_phases_follow_the_schedule(trainer: Callable[..., L.Trainer]) -> None:
    schedule = Schedule(
        calibration_batches=2, quantize_from=1, freeze_observers=2, freeze_batchnorm=3
    )
    seen = Phases()
    trainer(QATCallback(schedule=schedule), seen, max_epochs=4).fit(Net(), loader())
    float_, calibrate = (False, False, False), (True, False, False)
    quantize, frozen, bn_frozen = (True, True, False), (False, True, False), (False, True, True)
    assert seen.seen == (
        [float_] * 4 + [calibrate] * 2 + [quantize] * 2 + [frozen] * 4 + [bn_frozen] * 4
    )


def test_fractions_are_of_the_run_and_steps_count_optimizer_steps(
    trainer: Callable[..., L.Trainer],
) -> None:
    schedule = Schedule(
        calibration_batches=0, freeze_observers=0.5, freeze_batchnorm=0.75, interval="step"
    )
    seen = Phases()
    # 2 epochs of 4 batches, accumulated by 2: 4 steps; frozen from step 2, batch norm from 3.
    trainer(QATCallback(schedule=schedule), seen, accumulate_grad_batches=2).fit(Net(), loader())
    assert [observing for observing, _, _ in seen.seen] == [True] * 4 + [False] * 4
    assert [frozen for _, _, frozen in seen.seen] == [False] * 6 + [True] * 2


def test_fractions_of_a_run_that_steps_alone_limit_are_of_its_epochs(
    trainer: Callable[..., L.Trainer],
) -> None:
    # 8 steps, 4 an epoch, are 2 epochs: ranges freeze with the second.
    schedule = Schedule(calibration_batches=0, freeze_observers=0.5, freeze_batchnorm=None)
    seen = Phases()
    trainer(QATCallback(schedule=schedule), seen, max_epochs=-1, max_steps=8).fit(Net(), loader())
    assert [observing for observing, _, _ in seen.seen] == [True] * 4 + [False] * 4


def test_two_exporters_of_one_name_are_refused_before_training(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    net = Net()
    callback = QATCallback(exporters=[Failing(), Failing()], export_dir=tmp_path / "out")
    with pytest.raises(MisconfigurationException, match=r"got \['failing'\] more than once"):
        trainer(callback).fit(net, loader())
    assert net.losses == []


def test_each_phase_change_is_announced_once(
    trainer: Callable[..., L.Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    schedule = Schedule(calibration_batches=1, freeze_observers=1, freeze_batchnorm=None)
    trainer(QATCallback(schedule=schedule)).fit(Net(), loader())
    lines = [m for m in caplog.messages if m.startswith("QAT: epoch")]
    assert [line.split(" (")[0] for line in lines] == [
        "QAT: epoch 0, step 0: calibrate",
        "QAT: epoch 0, step 1: quantize",
        "QAT: epoch 1, step 4: observers_frozen",
    ]


def test_the_phase_is_logged(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    schedule = Schedule(calibration_batches=1, freeze_observers=1, freeze_batchnorm=None)
    trainer(QATCallback(schedule=schedule), logger=logger, log_every_n_steps=1).fit(Net(), loader())
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("qat/phase")
    assert [float(row.split(",")[column]) for row in rows[1:]] == [1, 2, 2, 2, 3, 3, 3, 3]


def test_frozen_batchnorm_survives_a_users_train_call(trainer: Callable[..., L.Trainer]) -> None:
    class Rude(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.train()

        def training_step(self, batch: list[Tensor]) -> Tensor:
            self.train()
            return super().training_step(batch)

    net = Rude()
    statistics = []

    class Watch(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
        ) -> None:
            statistics.append(net.bn.running_mean.clone())  # type: ignore[union-attr]

    schedule = Schedule(calibration_batches=0, freeze_observers=None, freeze_batchnorm=1)
    trainer(QATCallback(schedule=schedule), Watch()).fit(net, loader())
    assert not torch.equal(statistics[0], statistics[3])
    assert all(torch.equal(statistics[3], later) for later in statistics[4:])
    # The hold is gone after fit: the module is the user's again.
    net.train()(torch.randn(8, 1, 6, 6))
    assert not torch.equal(statistics[3], net.bn.running_mean)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- observation


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
        run = trainer(QATCallback(), num_sanity_val_steps=2)
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
    trainer(QATCallback(), max_epochs=1).fit(net, loader())
    lows = [float(x.min()) for x, _ in loader()]
    highs = [float(x.max()) for x, _ in loader()]
    low, high = ranges(net)[0]
    # Mean of four batches, in float32 updates.
    assert low == pytest.approx(sum(lows) / 4, rel=1e-6)
    assert high == pytest.approx(sum(highs) / 4, rel=1e-6)


def test_a_learning_rate_search_leaves_no_trace(trainer: Callable[..., L.Trainer]) -> None:
    from lightning.pytorch.callbacks import LearningRateFinder

    class Tunable(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.1

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    class Wild(LearningRateFinder):
        """Searches on data far outside the training data."""

        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            forward = pl_module.forward
            pl_module.forward = lambda x: forward(x * 1000)  # type: ignore[method-assign]
            self.lr_find(trainer, pl_module)
            del pl_module.forward

    net = Tunable()
    run = trainer(Wild(num_training_steps=3), QATCallback(), enable_checkpointing=True)
    run.fit(net, loader())
    data = torch.cat([x for x, _ in loader()])
    assert ranges(net)[0][1] <= float(data.max())


def test_non_finite_activations_name_the_layer(trainer: Callable[..., L.Trainer]) -> None:
    bad = loader()
    bad.dataset.tensors[0][9, 0, 0, 0] = torch.nan  # type: ignore[attr-defined]
    net = Net()
    with pytest.raises(
        ValueError,
        match=r"reached the input of 'conv', 'head', 'head.output_0_0', 'mean_0_0'\. The first of",
    ):
        trainer(QATCallback()).fit(net, bad)
    # The ranges are those of the batch before.
    assert all(torch.isfinite(torch.tensor(ranges(net))).flatten())


# ---------------------------------------------------------------------- where layers come from


class FromSetup(Net):
    def __init__(self) -> None:
        super().__init__()
        self.late: nn.Module

    def setup(self, stage: str) -> None:
        self.late = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.late(super().forward(x))
        return logits


class FromConfigureModel(FromSetup):
    def setup(self, stage: str) -> None:
        pass

    def configure_model(self) -> None:
        self.late = nn.Linear(3, 3)


class FromIdempotentConfigureModel(FromConfigureModel):
    def configure_model(self) -> None:
        if not hasattr(self, "late"):
            super().configure_model()


@pytest.mark.parametrize("kind", [FromSetup, FromConfigureModel, FromIdempotentConfigureModel])
def test_layers_made_late_are_quantized_trained_and_resumed(
    trainer: Callable[..., L.Trainer], tmp_path: Path, kind: type[Net]
) -> None:
    net = kind()
    callback = QATCallback()
    run = trainer(callback)
    run.fit(net, loader())
    assert isinstance(net.late, LinearQAT)
    assert callback.report is not None
    assert [layer.name for layer in callback.report.swapped] == ["conv", "head", "late"]
    trained = {p for group in run.optimizers[0].param_groups for p in group["params"]}
    assert set(net.parameters()) == trained
    assert "configure_model" not in vars(net)

    run.save_checkpoint(tmp_path / "late.ckpt")
    again = kind()
    trainer(QATCallback(), max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "late.ckpt")
    assert isinstance(again.late, LinearQAT)


def test_a_layer_made_in_on_fit_start_is_an_error(trainer: Callable[..., L.Trainer]) -> None:
    class TooLate(Net):
        pass

    class Replace(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.head = nn.Linear(4, 3)

    with pytest.raises(
        MisconfigurationException,
        match=r"must exist when training is set up.*'head'. Make layers in __init__",
    ):
        trainer(Replace(), QATCallback()).fit(TooLate(), loader())


def test_aliases_and_stored_parameters_stay_the_same_objects(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Aliased(Net):
        def __init__(self) -> None:
            super().__init__()
            self.same_head = self.head
            self.in_a_list = [self.conv]
            self.own = list(self.parameters())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.own, 0.1)

    net = Aliased()
    before = net.head.weight.clone()
    callback = QATCallback()
    trainer(callback).fit(net, loader())
    assert net.same_head is net.head
    assert net.in_a_list[0] is net.conv
    assert isinstance(net.conv, Conv2dQAT)
    assert not torch.equal(net.head.weight, before)
    assert callback.report is not None
    assert callback.report.swapped[1].aliases == ("same_head",)


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("step", [8, 6], ids=["epoch boundary", "mid-epoch"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(
    trainer: Callable[..., L.Trainer], tmp_path: Path, step: int
) -> None:
    schedule = Schedule(calibration_batches=5, freeze_observers=3, freeze_batchnorm=3)
    batches = list(loader())

    class ByIndex(Net):
        """A plain DataLoader starts over on a mid-epoch resume; the batch index does not."""

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
            return super().training_step(batches[batch_idx])

    def net() -> Net:
        L.seed_everything(3, verbose=False)
        return ByIndex()

    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    options: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": True}
    whole = net()
    trainer(QATCallback(schedule=schedule), saved, **options).fit(whole, loader())
    resumed = net()
    trainer(QATCallback(schedule=schedule), max_epochs=4).fit(
        resumed, loader(), ckpt_path=tmp_path / f"step={step}.ckpt"
    )
    assert len(resumed.losses) == 4 * BATCHES - step
    state, wanted = resumed.state_dict(), whole.state_dict()
    assert state.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(state[key], value) if isinstance(value, Tensor) else state[key] == value
    assert resumed.losses == whole.losses[-len(resumed.losses) :]


def test_validating_a_fresh_module_with_a_checkpoint_equals_validating_live(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    run = trainer(QATCallback())
    net = Net()
    run.fit(net, loader())
    live = run.validate(net, loader(seed=1), verbose=False)
    run.save_checkpoint(tmp_path / "qat.ckpt")
    fresh = trainer(QATCallback()).validate(
        Net(), loader(seed=1), ckpt_path=tmp_path / "qat.ckpt", verbose=False
    )
    assert fresh == live


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_loads_without_the_callback(
    trainer: Callable[..., L.Trainer], tmp_path: Path, weights_only: bool
) -> None:
    run = trainer(QATCallback("w4a8"))
    net = Net()
    run.fit(net, loader())
    run.save_checkpoint(tmp_path / "qat.ckpt", weights_only=weights_only)
    # Only primitives and tensors: the safe loader reads it.
    torch.load(tmp_path / "qat.ckpt", weights_only=True)
    loaded = load_qat_checkpoint(Net, tmp_path / "qat.ckpt")
    assert type(loaded) is Net
    assert loaded.conv.weight_quantizer.spec.bits == 4  # type: ignore[union-attr]
    x = torch.randn(4, 1, 6, 6)
    assert torch.equal(loaded.eval()(x), net.eval()(x))


def test_another_recipe_than_the_checkpoints_is_named_key_by_key(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    run = trainer(QATCallback("int8"))
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "qat.ckpt")
    with pytest.raises(RuntimeError, match=r"conv.weight_quantizer: .*bits: checkpoint 8, model 4"):
        trainer(QATCallback("w4a8")).validate(Net(), loader(), ckpt_path=tmp_path / "qat.ckpt")


def test_fit_may_be_called_again(trainer: Callable[..., L.Trainer]) -> None:
    net, callback = Net(), QATCallback()
    trainer(callback).fit(net, loader())
    trainer(callback).fit(net, loader())
    other = Net()
    trainer(callback).fit(other, loader())
    assert isinstance(other.conv, Conv2dQAT)
    assert ranges(other)[0] != (0.0, 0.0)


# ---------------------------------------------------------------------- export


def test_fit_leaves_files_and_a_manifest_and_the_live_model_as_it_was(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    net = Net()
    callback = QATCallback(exporters=["fake_quant_onnx"], export_dir=out)
    after: dict[str, Any] = {}

    class Last(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            state = pl_module.state_dict()
            after.update({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)})

    run = trainer(callback, Last())
    run.fit(net, loader())
    assert {path.name for path in out.iterdir()} == {"net.pt2", "net_qdq.onnx", "manifest.json"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["targets"]["fake_quant_onnx"]["agreement"]["parameters_equal"] is True
    assert callback.delivered[0].agreement is not None
    assert callback.delivered[0].agreement.max_steps < 1
    for key, value in after.items():
        assert torch.equal(net.state_dict()[key], value)
    assert isinstance(net.conv, Conv2dQAT)
    model = QuantizedModel.load(out / "net.pt2")
    x = torch.randn(5, 1, 6, 6)
    # Batch norm is folded in the file: float32 rounding apart.
    torch.testing.assert_close(model(x), net.eval()(x), rtol=1e-4, atol=1e-5)


def test_export_from_best_loads_the_best_checkpoint_into_a_copy(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(
        tmp_path / "checkpoints", monitor="val_loss", save_top_k=-1, filename="{epoch}"
    )
    net, out = Net(), tmp_path / "out"
    callback = QATCallback(
        schedule=Schedule(calibration_batches=1),
        exporters=["fake_quant_onnx"],
        export_dir=out,
        export_from="best",
    )
    trainer(callback, checkpoints, enable_checkpointing=True, max_epochs=3).fit(
        net, loader(), loader(seed=1)
    )
    best = load_qat_checkpoint(Net, checkpoints.best_model_path)
    x = torch.randn(5, 1, 6, 6)
    model = QuantizedModel.load(out / "net.pt2")
    torch.testing.assert_close(model(x), best.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_best_checkpoint_from_before_quantization_is_refused(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", monitor="early", mode="min")

    class EarlyIsBest(Net):
        def validation_step(self, batch: list[Tensor]) -> None:
            self.log("early", float(self.current_epoch))

    callback = QATCallback(
        schedule=Schedule(quantize_from=1),
        exporters=["fake_quant_onnx"],
        export_dir=tmp_path / "out",
        export_from="best",
    )
    with pytest.raises(RuntimeError, match=r"was saved in phase 'float', before the network was"):
        trainer(callback, checkpoints, enable_checkpointing=True).fit(
            EarlyIsBest(), loader(), loader()
        )


def test_export_from_best_without_a_best_checkpoint_warns(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = QATCallback(
        exporters=["fake_quant_onnx"], export_dir=tmp_path / "out", export_from="best"
    )
    with pytest.warns(UserWarning, match="there is no best checkpoint"):
        trainer(callback).fit(Net(), loader())
    assert (tmp_path / "out/net_qdq.onnx").is_file()


def test_fast_dev_run_exports_and_leaves_nothing(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = QATCallback(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    trainer(callback, fast_dev_run=True).fit(Net(), loader(), loader())
    assert callback.delivered[0].artifact is not None
    assert callback.delivered[0].error is None
    assert not (tmp_path / "out").exists()


class Failing:
    name = "failing"

    def check_available(self) -> None:
        pass

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        raise OSError("disk full")


def test_a_failing_exporter_does_not_cost_the_others(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = QATCallback(exporters=[Failing(), "fake_quant_onnx"], export_dir=tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"1 of 2 exports failed[^\n]*\nfailing: OSError: disk"):
        trainer(callback).fit(Net(), loader())
    assert (tmp_path / "out/net_qdq.onnx").is_file()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["targets"]["failing"]["error"] == "OSError: disk full"


def test_on_export_error_warn_finishes_fit(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = QATCallback(
        exporters=[Failing()], export_dir=tmp_path / "out", on_export_error="warn"
    )
    run = trainer(callback)
    with pytest.warns(UserWarning, match="failing: OSError: disk full"):
        run.fit(Net(), loader())
    assert run.state.finished


# ---------------------------------------------------------------------- bad input


def test_two_callbacks_are_refused(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `QATCallback"):
        trainer(QATCallback(), QATCallback())


def test_bad_options_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"No recipe named 'int9'; closest names: 'int8'"):
        QATCallback("int9")
    with pytest.raises(ValueError, match=r"exporters must be a list; got 'cann'. Write exporters="):
        QATCallback(exporters="cann")
    with pytest.raises(ValueError, match=r"export_from must be 'last' or 'best'; got 'first'"):
        QATCallback(export_from="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"on_export_error must be 'raise' or 'warn'"):
        QATCallback(on_export_error="ignore")  # type: ignore[arg-type]


def test_problems_are_found_before_training_and_named_together(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Unavailable(Failing):
        def check_available(self) -> None:
            raise MissingDependency("Target 'failing' needs the package 'vapor'. pip install vapor")

    class NoForward(Net):
        forward = L.LightningModule.forward

    (tmp_path / "file").write_text("not a folder")
    callback = QATCallback(
        exporters=["fake_quant_onx", Unavailable()], export_dir=tmp_path / "file" / "out"
    )
    net = NoForward()
    with pytest.raises(MisconfigurationException) as caught:
        trainer(callback).fit(net, loader())
    message = str(caught.value)
    assert "No exporter named 'fake_quant_onx'; closest names: 'fake_quant_onnx'" in message
    assert "needs the package 'vapor'. pip install vapor" in message
    assert "NoForward must implement forward(): it is what is exported" in message
    assert "The export directory" in message
    assert "must be writable" in message
    assert net.losses == []


def test_unknown_patterns_and_nothing_to_quantize_are_found_before_training(
    trainer: Callable[..., L.Trainer],
) -> None:
    net = Net()
    with pytest.raises(
        ValueError, match=r"'hed' in Recipe.exclude matches no layer; closest .*head"
    ):
        trainer(QATCallback(Recipe(exclude=("hed",)))).fit(net, loader())
    with pytest.raises(ValueError, match=r"Nothing to quantize in Net"):
        trainer(QATCallback(Recipe(exclude=("conv", "head")))).fit(Net(), loader())
    assert net.losses == []


def test_an_untraceable_forward_trains_but_is_refused_for_export_after_the_first_batch(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:
                x = x / 2
            return super().forward(x)

    net = Branching()
    trainer(QATCallback()).fit(net, loader())
    assert len(net.losses) == 2 * BATCHES

    net = Branching()
    callback = QATCallback(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    with pytest.raises(CaptureError, match=r"could not capture Branching.*if float\(x.sum\(\)\)"):
        trainer(callback).fit(net, loader())
    assert len(net.losses) == 1


def test_unknown_example_inputs_are_an_error_after_the_first_batch(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class AroundForward(Net):
        def training_step(self, batch: list[Tensor]) -> Tensor:
            features = F.relu(self.bn(self.conv(batch[0]))).mean((2, 3))
            loss = F.cross_entropy(self.head(features), batch[1])
            self.losses.append(float(loss.detach()))
            return loss

    net = AroundForward()
    callback = QATCallback(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    with pytest.raises(MisconfigurationException, match=r"pass QATCallback\(example_inputs=...\)"):
        trainer(callback).fit(net, loader())
    assert len(net.losses) == 1

    net = AroundForward()
    callback = QATCallback(
        Recipe(joins=False),
        exporters=["fake_quant_onnx"],
        export_dir=tmp_path / "out",
        example_inputs=[2, 1, 6, 6],
    )
    trainer(callback).fit(net, loader())
    assert (tmp_path / "out/aroundforward_qdq.onnx").is_file()


def test_fractions_of_an_endless_run_are_refused(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(MisconfigurationException, match="fractions need a run of known length"):
        trainer(QATCallback(), max_epochs=-1).fit(Net(), loader())


def test_averaging_before_quantization_is_refused(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"Put QATCallback before StochasticWeightAveraging"
    ):
        trainer(StochasticWeightAveraging(1e-2), QATCallback()).fit(Net(), loader())


def test_data_parallel_and_other_strategies_are_refused_by_name() -> None:
    callback = QATCallback()

    class Stub:
        callbacks: tuple[L.Callback, ...] = ()
        precision_plugin = object()

        def __init__(self, strategy: object) -> None:
            self.strategy = strategy

    def problems(strategy: object, net: nn.Module) -> list[str]:
        return environment_problems(Stub(strategy), net, callback)  # type: ignore[arg-type]

    fsdp = FSDPStrategy.__new__(FSDPStrategy)
    assert problems(fsdp, Net()) == [
        "QATCallback supports single-device and DistributedDataParallel training only; got "
        "FSDPStrategy. Use Trainer(strategy='ddp')."
    ]
    net = Net()
    net.wrapped = nn.DataParallel(nn.Linear(2, 2))
    (problem,) = problems(DDPStrategy(), net)
    assert problem.startswith("wrapped is wrapped in torch.nn.DataParallel")
    assert problems(DDPStrategy(), Net()) == []


def test_a_prepared_model_works_without_the_callback() -> None:
    net = Net()
    prepare(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in loader():
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ranges(net)[0][1] > 0


def test_an_exception_in_training_leaves_the_module_clean(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Crash(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
        ) -> None:
            if trainer.global_step == 6:
                raise RuntimeError("crash")

    net = Net()
    schedule = Schedule(calibration_batches=1, freeze_batchnorm=1)
    with pytest.raises(RuntimeError, match="crash"):
        trainer(QATCallback(schedule=schedule), Crash()).fit(net, loader())
    assert not net.bn._forward_pre_hooks
    assert "configure_model" not in vars(net)
    trainer(QATCallback(schedule=schedule)).fit(net, loader())
