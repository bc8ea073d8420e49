"""Lightning's training and evaluation hooks, translated into phases, ranges and cached weights."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_qat.callback.calibration.without_training import WithoutTraining
from lightning_qat.callback.console import say
from lightning_qat.callback.lightning_private import is_fitting
from lightning_qat.callback.loggers import QuantizationLog
from lightning_qat.callback.phase_tracker import DESCRIPTIONS, PhaseTracker
from lightning_qat.callback.watch.training_watch import TrainingWatch
from lightning_qat.checkpoint.contents import has_ranges
from lightning_qat.layers.quantized_weights import QuantizedWeight
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.observation_gate import ObservationGate
from lightning_qat.quantizers.switches import switch
from lightning_qat.quantizers.weight_cache import QuantizedWeightCache
from lightning_qat.recipe.schedule import Phase, Schedule
from lightning_qat.report.run_record import RunRecord
from lightning_qat.training.learned_weights import follow_weights, learned_weights
from lightning_qat.training.phases import (
    apply_phase,
    release_batchnorms,
    set_quantizing,
)
from lightning_qat.training.range_sync import RangeCommits, activation_quantizers, drop_pending
from lightning_qat.training.weights_once import use_weight_cache


class PhaseHooks(Callback):
    """Takes a QAT module through the phases of a schedule, batch by batch.

    Ranges are committed after each training batch that observes, and each weight is quantized once
    for the batches between two optimizer steps, and once for those of an evaluation.

    Args:
        schedule: The schedule; its milestones are set when the length of the run is known.
        log: So many steps lie between two whose quantizers are logged; ``None``: none is.
    """

    def __init__(self, schedule: Schedule, log: int | None = None) -> None:
        self._log = QuantizationLog(log)
        self._phases = PhaseTracker(schedule)
        self._calibration = WithoutTraining(schedule)
        # As long as an epoch: walking over a model costs more than committing its ranges.
        self._quantizers: dict[str, ActivationQuantizer] = {}
        self._learned_weights: list[QuantizedWeight] = []
        self._weights = QuantizedWeightCache()
        self._commits = RangeCommits()
        self._gate = ObservationGate()
        self._record = RunRecord()
        self._watch = TrainingWatch()

    def on_phase_change(
        self, trainer: Trainer, pl_module: LightningModule, old: Phase | None, new: Phase
    ) -> None:
        """Called before the first batch of every phase; override it to act on one.

        Args:
            trainer: The trainer.
            pl_module: The module; it is in the new phase already.
            old: The phase before; ``None`` when training starts or is resumed.
            new: The phase from this batch on.

        Example::

            class Slower(QATCallback):
                def on_phase_change(self, trainer, pl_module, old, new):
                    if new.name == "observers_frozen":
                        trainer.optimizers[0].param_groups[0]["lr"] *= 0.1
        """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find_quantizers(pl_module)
        # What a batch that raised in an earlier fit has observed is not part of this one.
        drop_pending(self._quantizers.values())
        # In manual optimization steps may follow each other unseen.
        use_weight_cache(pl_module, self._weights if pl_module.automatic_optimization else None)
        self._gate.open = False
        self._phases.leave_phase()
        self._record, self._watch = RunRecord(), TrainingWatch()
        self._calibration.start(trainer, pl_module)
        self._enter_phase(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find_quantizers(pl_module)

    def _find_quantizers(self, pl_module: LightningModule) -> None:
        self._quantizers = activation_quantizers(pl_module)
        self._learned_weights = learned_weights(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter_phase(trainer, pl_module)
        self._calibration.before_batch(pl_module, self._phases.phase)
        self._weights.open = True
        self._gate.open, self._gate.trains_in_eval = True, not pl_module.training
        self._log.start(trainer, pl_module)
        self._watch.start(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self._weights.forget()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._weights.open = False
        self._gate.open = False
        assert self._phases.phase is not None
        if self._phases.phase.observing:
            self._commits.commit(self._quantizers)
        else:
            self._commits.check()
        follow_weights(self._learned_weights)
        self._phases.count_batch()
        if self._calibration.after_batch(trainer, self._phases.batches_seen):
            # The validation that follows is of the quantized module.
            self._enter_phase(trainer, pl_module)
        self._log.finish(trainer)
        self._record.add(trainer.global_step, outputs)
        self._watch.finish(pl_module, outputs)

    def _enter_phase(self, trainer: Trainer, pl_module: LightningModule) -> None:
        old = self._phases.phase
        new = self._phases.enter_phase(trainer.current_epoch, trainer.global_step)
        if new == old:
            return
        apply_phase(pl_module, new)
        if old is None or new.name != old.name:
            say(
                f"epoch {trainer.current_epoch}, step {trainer.global_step}: {new.name} "
                f"({DESCRIPTIONS[new.name]})"
            )
            self._record.enter(trainer.global_step, new.name)
            self._watch.enter(new.name)
            # To the loggers, at the change: self.log at every step costs more than the ranges.
            for logger in trainer.loggers:
                logger.log_metrics({"qat/phase": float(new.index)}, step=trainer.global_step)
            self.on_phase_change(trainer, pl_module, old, new)

    # Outside the training batches the gate is closed: no evaluation is observed, in whatever mode.

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_fitting(trainer):
            self._quantize_if_calibrated(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._quantize_if_calibrated(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._quantize_if_calibrated(pl_module)

    def _quantize_if_calibrated(self, pl_module: LightningModule) -> None:
        """Without ranges, as with a float checkpoint, the result is the float module's."""
        set_quantizing(pl_module, has_ranges(pl_module))

    # Each weight is quantized once for the batches of an evaluation. It is kept for these alone: in
    # between other callbacks may exchange weights, such as an average's, in ways torch cannot see.

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self._forget_what_may_have_changed()
        self._weights.open = True

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._weights.open = False

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget_what_may_have_changed()

    def _forget_what_may_have_changed(self) -> None:
        """Compute anew what averages change in ways torch cannot see: weights and scales."""
        self._weights.forget()
        for quantizer in self._quantizers.values():
            quantizer.forget_qparams()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._commits.check()
        self._calibration.correct()
        use_weight_cache(pl_module, None)
        problem = self._phases.never_quantized()
        if problem is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(f"QAT: {problem}")

    def _release(self, pl_module: LightningModule) -> None:
        """Let go of the module: its quantizers, cached weights and frozen batch norms."""
        self._calibration.end()
        self._log.cancel()
        self._watch.cancel()
        self._quantizers, self._learned_weights = {}, []
        self._commits = RangeCommits()
        self._weights = QuantizedWeightCache()
        use_weight_cache(pl_module, None)
        switch(pl_module, gate=None)
        release_batchnorms(pl_module)
