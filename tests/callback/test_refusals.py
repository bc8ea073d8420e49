"""What cannot work is refused by name before anything starts, with what to do instead."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import strategies
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_qat import QATCallback, Recipe, Schedule
from lightning_qat.callback.trainer_checks import trainer_problems
from tests.callback.tiny import Net, loader, qat


def test_two_callbacks_are_refused(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `QATCallback"):
        trainer(qat(), qat())


def test_bad_options_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"No recipe named 'int9'; closest names: 'int8'"):
        qat("int9")
    with pytest.raises(ValueError, match=r"exporters must be a list; got 'cann'. Write exporters="):
        qat(exporters="cann")
    with pytest.raises(ValueError, match=r"export_from must be 'last' or 'best'; got 'first'"):
        qat(export_from="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"on_export_error must be 'raise' or 'warn'"):
        qat(on_export_error="ignore")  # type: ignore[arg-type]


def test_unknown_patterns_and_nothing_to_quantize_are_found_before_training(
    trainer: Callable[..., L.Trainer],
) -> None:
    net = Net()
    with pytest.raises(
        ValueError, match=r"'hed' in Recipe.exclude matches no layer; closest .*head"
    ):
        trainer(qat(Recipe(exclude=("hed",)))).fit(net, loader())
    with pytest.raises(ValueError, match=r"Nothing to quantize in Net"):
        trainer(qat(Recipe(exclude=("conv", "head")))).fit(Net(), loader())
    assert net.losses == []


class Stub:
    """As much of a Trainer as the checks read."""

    precision_plugin: object = object()

    def __init__(self, strategy: object, callback: L.Callback) -> None:
        self.strategy, self.callbacks = strategy, [callback]


def problems(strategy: object, net: nn.Module | None = None, precision: object = None) -> list[str]:
    callback = QATCallback()
    stub = Stub(strategy, callback)
    stub.precision_plugin = precision
    return trainer_problems(
        stub,  # type: ignore[arg-type]
        Net() if net is None else net,  # type: ignore[arg-type]
        callback,
        callback.recipe,
        callback.schedule,
        False,
    )


@pytest.mark.parametrize(
    "strategy",
    [
        strategies.FSDPStrategy,
        strategies.DeepSpeedStrategy,
        strategies.ModelParallelStrategy,
        strategies.XLAStrategy,  # type: ignore[attr-defined]
        strategies.SingleDeviceXLAStrategy,  # type: ignore[attr-defined]
    ],
)
def test_sharding_and_xla_strategies_are_refused_by_name(
    strategy: type[strategies.Strategy],
) -> None:
    # What they need to be made is not here; DeepSpeed and XLA subclass what is supported.
    assert problems(strategy.__new__(strategy)) == [
        "QATCallback supports single-device and DistributedDataParallel training only; got "
        f"{strategy.__name__}. Use Trainer(strategy='ddp')."
    ]


def test_a_strategy_that_restores_weights_after_wrapping_is_refused() -> None:
    class Late(strategies.DDPStrategy):
        @property
        def restore_checkpoint_after_setup(self) -> bool:
            return True

    (problem,) = problems(Late())
    assert "got Late. Use Trainer(strategy='ddp')." in problem


def test_an_unknown_kind_of_ddp_is_allowed_with_a_warning() -> None:
    class Own(strategies.DDPStrategy):
        pass

    with pytest.warns(UserWarning, match="has not been tried with Own; it is treated as the"):
        assert problems(Own()) == []
    assert problems(strategies.DDPStrategy()) == []
    assert problems(strategies.SingleDeviceStrategy("cpu")) == []


@pytest.mark.parametrize("kind", ["BitsandbytesPrecision", "TransformerEnginePrecision"])
def test_precision_plugins_that_replace_layers_are_refused(kind: str) -> None:
    (problem,) = problems(strategies.DDPStrategy(), precision=type(kind, (), {})())
    assert problem.startswith(f"The precision plugin {kind} replaces Linear layers")
    assert problem.endswith("Use precision='32-true' or a mixed precision.")


def test_data_parallel_anywhere_is_refused(trainer: Callable[..., L.Trainer]) -> None:
    net = Net()
    net.wrapped = nn.DataParallel(nn.Linear(2, 2))
    with pytest.raises(
        MisconfigurationException,
        match=r"wrapped is wrapped in torch.nn.DataParallel.*use Trainer\(strategy='ddp'",
    ):
        trainer(qat()).fit(net, loader())


def test_data_parallel_from_configure_model_is_refused_too(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Wraps(Net):
        def configure_model(self) -> None:
            self.conv = nn.DataParallel(self.conv)  # type: ignore[assignment]

    with pytest.raises(MisconfigurationException, match=r"conv is wrapped in torch.nn.DataPara"):
        trainer(qat()).fit(Wraps(), loader())


def test_a_trainer_of_pytorch_lightning_is_refused(tmp_path: Path) -> None:
    foreign = type("Trainer", (Stub,), {"__module__": "pytorch_lightning.trainer.trainer"})
    callback = QATCallback()
    found = trainer_problems(
        foreign(object(), callback), Net(), callback, callback.recipe, callback.schedule, False
    )
    assert found == [
        "QATCallback belongs to the lightning package; got a Trainer of pytorch_lightning, whose "
        "classes are not the same. Import Trainer from lightning.pytorch."
    ]


@pytest.mark.filterwarnings("ignore")  # of the other package
def test_the_real_trainer_of_pytorch_lightning_is_refused(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Foreign(other.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return self.head(batch[0]).sum()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = other.Trainer(
        accelerator="cpu", callbacks=[QATCallback()], default_root_dir=tmp_path, **quiet
    )
    # The exception class is the lightning package's.
    with pytest.raises(MisconfigurationException, match=r"got a Trainer of pytorch_lightning"):
        run.fit(Foreign(), [[torch.zeros(2, 4)]])


def test_a_module_of_pytorch_lightning_is_refused_by_lightning(
    trainer: Callable[..., L.Trainer],
) -> None:
    other = pytest.importorskip("pytorch_lightning")
    with pytest.raises(TypeError, match=r"You passed a `pytorch_lightning` object"):
        trainer(qat()).fit(other.LightningModule(), loader())


def test_subclasses_of_the_callback_count_as_the_callback(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Own(QATCallback):
        pass

    with pytest.raises(RuntimeError, match=r"more than one stateful callback"):
        trainer(QATCallback(), Own())


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ({"quantize_from": 2}, r"quantize_from=2, but this run ends after 2 epochs, so nothing"),
        (
            {"quantize_from": 8, "interval": "step"},
            r"quantize_from=8, but this run ends after 8 steps, so nothing would ever",
        ),
    ],
)
def test_a_schedule_that_starts_after_the_end_is_refused(
    trainer: Callable[..., L.Trainer], schedule: dict[str, Any], text: str
) -> None:
    net = Net()
    with pytest.raises(MisconfigurationException, match=text):
        trainer(QATCallback(schedule=Schedule(**schedule))).fit(net, loader())
    assert net.losses == []


@pytest.mark.parametrize("name", ["freeze_observers", "freeze_batchnorm"])
def test_a_milestone_past_the_end_is_warned_of(
    trainer: Callable[..., L.Trainer], name: str
) -> None:
    schedule = Schedule(calibration_batches=1, **{name: 7})  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=rf"{name}=7, but this run ends after 2 epochs.*=None"):
        trainer(QATCallback(schedule=schedule)).fit(Net(), loader())
    # One batch of a fast_dev_run is no run to judge a schedule by.
    trainer(QATCallback(schedule=schedule), fast_dev_run=True).fit(Net(), loader())


def test_a_run_that_ends_while_calibrating_is_warned_of(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.warns(UserWarning, match=r"ended in phase 'calibrate' after 8 of 9 calibration"):
        trainer(QATCallback(schedule=Schedule(calibration_batches=9))).fit(Net(), loader())


def test_one_and_one_point_nought_are_told_apart() -> None:
    assert Schedule(freeze_observers=1).freeze_observers == 1
    with pytest.raises(ValueError, match=r"freeze_observers .*got 1.0. Write 1 \(an int\)"):
        Schedule(freeze_observers=1.0)


def test_fractions_of_data_without_a_length_are_refused_in_steps(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Stream(IterableDataset[list[Tensor]]):
        def __iter__(self) -> Iterator[list[Tensor]]:
            return iter(loader())

    stream = DataLoader(Stream(), batch_size=None)
    with pytest.raises(MisconfigurationException, match="fractions need a run of known length"):
        trainer(QATCallback(schedule=Schedule(interval="step"))).fit(Net(), stream)
    schedule = Schedule(calibration_batches=1, freeze_observers=0.5, freeze_batchnorm=None)
    trainer(QATCallback(schedule=schedule)).fit(Net(), stream)


def test_fractions_of_steps_under_manual_optimization_are_refused(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    # How many optimizer steps a batch takes is known to the module only.
    with pytest.raises(MisconfigurationException, match="fractions need a run of known length"):
        trainer(QATCallback(schedule=Schedule(interval="step"))).fit(Manual(), loader())
