"""``QATCallback``: Lightning's hooks, translated into prepare, phases, convert and export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_qat.callback.final_export import Export, as_float32
from lightning_qat.callback.input_recorder import InputRecorder
from lightning_qat.callback.patch_once import PatchOnce
from lightning_qat.callback.refusals import (
    data_parallel_problems,
    environment_problems,
    learning_rate_problem,
)
from lightning_qat.callback.run_length import resolve
from lightning_qat.checkpoint.contents import (
    CALLBACK_KEY,
    STATE_VERSION,
    has_ranges,
    is_quantized,
    missing_problem,
    recipe_problem,
    version_problem,
)
from lightning_qat.export.manifest import ExportResult
from lightning_qat.export.protocol import Exporter
from lightning_qat.function_hooks.hooks import unwind
from lightning_qat.joins.apply import plan_of
from lightning_qat.joins.first_forward import finish_plan
from lightning_qat.layers import QATLayer
from lightning_qat.numerics.kernels import loops as kernels
from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.prepare.swap import plan, swap
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.weight_cache import QuantizedWeightCache
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.schedule import Milestones, Phase, Schedule
from lightning_qat.recipe.typed_dicts import RecipeKeys
from lightning_qat.training.phases import (
    apply_phase,
    check_memory,
    finish,
    release_batchnorms,
    set_observing,
    set_quantizing,
)
from lightning_qat.training.range_sync import activation_quantizers, commit_pending, drop_pending
from lightning_qat.training.weights_once import use_weight_cache

_PHASE_LINES = {
    "float": "training in float",
    "calibrate": "observing activation ranges, not quantizing yet",
    "quantize": "fake quantization on, ranges follow the data",
    "observers_frozen": "activation ranges frozen",
    "batchnorm_frozen": "batch norm statistics frozen",
}


class QATCallback(Callback):
    """Quantization-aware training of any LightningModule, with exports when ``fit`` ends.

    Layers become QAT layers before a checkpoint is restored and before the optimizer is made, so
    resuming, validating and testing from QAT checkpoints work as usual. Training batches are the
    only data that ranges ever see. When ``fit`` ends a copy of the module is converted and every
    exporter writes its files into ``export_dir``, with a ``manifest.json`` that says how far each
    is from the trained model. The live module is never converted.

    Args:
        recipe: What is quantized how: a preset (``int8``, ``w4a8``, ``w4a4``, ``a16w8``,
            ``amct``), a YAML or JSON file, a ``Recipe`` or a mapping.
        schedule: When ranges and batch norm freeze; ``Schedule()`` by default.
        exporters: Names (``fake_quant_onnx``, ``cann``) or exporter objects.
        export_dir: Where files go; ``qat_export`` in the logger's folder by default.
        export_from: ``last`` exports the weights that ``fit`` ends with, ``best`` those of the
            monitored checkpoint callback's best checkpoint.
        example_inputs: What ``forward`` takes: a tensor, a tuple of positional arguments or a
            mapping of keyword arguments; a list of ints is the shape of one float tensor. By
            default ``example_input_array``, else the inputs of the first ``forward`` in training.
        verify: Compare every file with the trained model, on the example inputs.
        on_export_error: ``raise`` after all other targets are written, or ``warn``.
        float_learning_rate: What the float training began with. When given, a learning rate far
            above a hundredth of it, with which fine-tuning should start, is warned of.
        memory: ``compact`` lets training keep less for backward than float training does, at some
            cost in time; see ``prepare``.

    Raises:
        ValueError: An unknown recipe, key or option.

    Example::

        trainer = Trainer(callbacks=[QATCallback("int8", exporters=["fake_quant_onnx", "cann"])])
        trainer.fit(module, datamodule)
    """

    def __init__(
        self,
        recipe: str | Recipe | RecipeKeys = "int8",
        schedule: Schedule | None = None,
        exporters: Sequence[str | Exporter] = (),
        export_dir: str | Path | None = None,
        export_from: Literal["last", "best"] = "last",
        example_inputs: Any = None,
        verify: bool = True,
        on_export_error: Literal["raise", "warn"] = "raise",
        float_learning_rate: float | None = None,
        memory: Literal["fast", "compact"] = "fast",
    ) -> None:
        if isinstance(exporters, str):
            raise ValueError(
                f"exporters must be a list; got {exporters!r}. Write exporters=[{exporters!r}]."
            )
        if export_from not in ("last", "best"):
            raise ValueError(f"export_from must be 'last' or 'best'; got {export_from!r}.")
        if on_export_error not in ("raise", "warn"):
            raise ValueError(f"on_export_error must be 'raise' or 'warn'; got {on_export_error!r}.")
        if float_learning_rate is not None and not float_learning_rate > 0:
            raise ValueError(
                f"float_learning_rate must be positive or None; got {float_learning_rate!r}."
            )
        check_memory(memory)
        self.recipe = Recipe.load(recipe)
        self.schedule = schedule or Schedule()
        self.exporters = tuple(exporters)
        self.export_dir = export_dir
        self.export_from: Literal["last", "best"] = export_from
        self.example_inputs = _from_shape(example_inputs)
        self.verify = verify
        self.on_export_error = on_export_error
        self.float_learning_rate = float_learning_rate
        self.memory: Literal["fast", "compact"] = memory
        self.report: PrepareReport | None = None
        """What was quantized, once ``fit`` has started."""
        self.delivered: tuple[ExportResult, ...] = ()
        """What was exported, once ``fit`` has ended."""
        self._export: Export | None = None
        self._calls: list[PatchOnce] = []
        # As long as an epoch: walking over a model costs more than committing its ranges.
        self._quantizers: dict[str, ActivationQuantizer] = {}
        self._weights = QuantizedWeightCache()
        self._start_anew()

    def _start_anew(self) -> None:
        """A run that begins at step 0 inherits nothing from another one of this callback."""
        self._milestones: Milestones | None = None
        self._phase: Phase | None = None
        self._batches_seen = 0

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

    # ------------------------------------------------------------------ before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        inputs_known = self._given_inputs(pl_module) is not None
        problems = environment_problems(
            trainer, pl_module, self, self.recipe, self.schedule, inputs_known
        )
        self._recorder = InputRecorder()
        self._export = None
        if stage == "fit" and self.exporters:
            self._export = Export(self.exporters, self.export_dir, self.export_from, self.verify)
            problems += self._export.problems(trainer, pl_module)
        if problems:
            raise MisconfigurationException("\n".join(problems))
        if stage == "fit" and trainer.global_step == 0:
            self._start_anew()
        # Layers that __init__ and earlier hooks made; LM.setup and configure_model may make more.
        first = PrepareReport((), ())
        if self.recipe.first_last is None:
            first = plan(pl_module, self.recipe, check_patterns=False)
        # Otherwise the last layer is known when all are there.
        swap(pl_module, first)

        def second_pass() -> None:
            self._prepare(pl_module, first)

        def check(checkpoint: Mapping[str, Any]) -> None:
            self._check_checkpoint(trainer, pl_module, checkpoint)

        # No callback hook runs between configure_model and the restoring of a checkpoint, nor
        # between its reading and its loading.
        self._calls = [
            PatchOnce(pl_module, "configure_model", after=second_pass),
            PatchOnce(pl_module, "on_load_checkpoint", before=check),
        ]

    def _prepare(self, pl_module: LightningModule, first: PrepareReport) -> None:
        inputs = self._inputs(pl_module)
        self.report = prepare(pl_module, self.recipe, inputs, self.memory).after(first)
        for quantizer in activation_quantizers(pl_module).values():
            quantizer.deferred, quantizer.observing = True, False

    def _check_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        """Say what is wrong with a checkpoint before torch lists hundreds of keys."""
        weights = checkpoint["state_dict"]
        if not is_quantized(weights):
            if _fitting(trainer):
                rank_zero_warn(
                    "The checkpoint is of a float run, and fit(ckpt_path=...) goes on with its "
                    "epochs, optimizer and learning rate. To fine-tune it, load its weights first: "
                    f"{type(pl_module).__name__}.load_from_checkpoint(path), then fit without "
                    "ckpt_path."
                )
            return
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        problem = version_problem(state) or recipe_problem(state, self.recipe)
        if problem is None and pl_module.strict_loading:
            problem = missing_problem(weights, pl_module)
        if problem is not None:
            raise MisconfigurationException(problem)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._audit(pl_module)
        try:
            milestones = resolve(self.schedule, trainer, pl_module)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self._milestones = (
            milestones if self._phase is None else milestones.going_on_from(self._phase)
        )
        if self.report is not None:
            rank_zero_info(f"QAT: {self.report}")
        if pl_module.device.type == "cpu":
            rank_zero_info(f"QAT: quantizers run as {kernels.way()}")
        if self._export is None:
            return
        if self._inputs(pl_module) is None:
            self._recorder.start(pl_module)
        else:
            self._check_capture(pl_module)

    def _audit(self, pl_module: LightningModule) -> None:
        """Refuse layers that came too late to be swapped: they would train in float, silently."""
        problems = data_parallel_problems(pl_module)
        late = plan(pl_module, self.recipe, check_patterns=False).swapped
        if late or not any(isinstance(m, QATLayer) for m in pl_module.modules()):
            names = ", ".join(repr(layer.name) for layer in late) or "all of them"
            problems.append(
                "Every layer that the recipe selects must exist when training is set up; these "
                f"were made or replaced later: {names}. Make layers in __init__, setup() or "
                "configure_model(), not in on_fit_start."
            )
        if problems:
            raise MisconfigurationException("\n".join(problems))

    # ------------------------------------------------------------------ training

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.float_learning_rate is not None:
            problem = learning_rate_problem(trainer, self.float_learning_rate)
            if problem is not None:
                rank_zero_warn(problem)
        self._phase = None
        self._quantizers = activation_quantizers(pl_module)
        # What a batch that raised in an earlier fit has observed is not part of this one.
        drop_pending(self._quantizers.values())
        # In manual optimization steps may follow each other unseen.
        use_weight_cache(pl_module, self._weights if pl_module.automatic_optimization else None)
        self._enter_phase(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._quantizers = activation_quantizers(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter_phase(trainer, pl_module)
        self._weights.open = True

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
        phase = self._phase
        assert phase is not None
        self._weights.open = False
        finish_plan(pl_module)
        if self.report is not None and self.report.joins is None:
            self._take_plan(trainer, pl_module)
        if phase.observing:
            commit_pending(self._quantizers)
        if phase.name != "float":
            self._batches_seen += 1
        if self._recorder.recording:
            self._require_inputs(pl_module)

    def _take_plan(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the first batch, whose forward has made the plan."""
        if self.report is None or not (self.recipe.joins or self.recipe.outputs):
            return
        joins = plan_of(pl_module)
        # Ranges are exchanged in the order of the plan.
        same = trainer.strategy.reduce_boolean_decision(joins == trainer.strategy.broadcast(joins))
        if joins is None:
            raise MisconfigurationException(
                f"training_step must call the module itself, so that {type(pl_module).__name__}"
                ".forward shows which tensors to quantize. Call self(...) in training_step, set "
                "example_input_array, pass QATCallback(example_inputs=...), or use a recipe with "
                "joins=False and outputs=False."
            )
        if not same:
            raise MisconfigurationException(
                "Every process must quantize the same tensors; the first batch took another path "
                f"through {type(pl_module).__name__}.forward on some of them. Set "
                "example_input_array or pass QATCallback(example_inputs=...), so that all plan "
                "with the same data."
            )
        self.report = replace(self.report, joins=joins)
        self._quantizers = activation_quantizers(pl_module)
        rank_zero_info(f"QAT: {joins}")

    def _enter_phase(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._milestones is not None
        epochs = self.schedule.interval == "epoch"
        position = trainer.current_epoch if epochs else trainer.global_step
        phase = self._milestones.phase_at(position, self._batches_seen)
        old = self._phase
        if phase == old:
            return
        apply_phase(pl_module, phase)
        self._phase = phase
        if old is None or phase.name != old.name:
            rank_zero_info(
                f"QAT: epoch {trainer.current_epoch}, step {trainer.global_step}: {phase.name} "
                f"({_PHASE_LINES[phase.name]})"
            )
            # To the loggers, at the change: self.log at every step costs more than the ranges.
            for logger in trainer.loggers:
                logger.log_metrics({"qat/phase": float(phase.index)}, step=trainer.global_step)
            self.on_phase_change(trainer, pl_module, old, phase)

    # Observers see training batches only: quantizers check self.training, and the gate is closed
    # as well, for modules that evaluate in train mode (Monte-Carlo dropout).

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer, pl_module)

    def _close(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_observing(activation_quantizers(pl_module).values(), False)
        if not _fitting(trainer):
            # Without ranges, as with a float checkpoint, the result is the float module's.
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
            self._weights.forget()
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
        self._weights.forget()
        if _fitting(trainer) and not trainer.sanity_checking and self._phase is not None:
            set_observing(activation_quantizers(pl_module).values(), self._phase.observing)

    # ------------------------------------------------------------------ example inputs

    def _given_inputs(self, pl_module: LightningModule) -> Any:
        """The example inputs that are known before training."""
        given = self.example_inputs
        return pl_module.example_input_array if given is None else given

    def _inputs(self, pl_module: LightningModule) -> Any:
        """The example inputs as far as they are known by now."""
        given = self._given_inputs(pl_module)
        return as_float32(self._recorder.inputs if given is None else given)

    def _require_inputs(self, pl_module: LightningModule) -> None:
        """After the first batch the inputs are known, or will never be."""
        self._recorder.stop()
        if self._inputs(pl_module) is None:
            raise MisconfigurationException(
                "Export needs example inputs, and training_step did not call the module itself, so "
                f"they are not known. Call self(...) in {type(pl_module).__name__}.training_step, "
                "set example_input_array, or pass QATCallback(example_inputs=...)."
            )
        self._check_capture(pl_module)

    def _check_capture(self, pl_module: LightningModule) -> None:
        """Better to know in the first minute than after the last epoch."""
        assert self._export is not None
        try:
            self._export.check_capture(pl_module, self._inputs(pl_module))
        except RuntimeError as error:
            if self.on_export_error == "raise":
                raise
            rank_zero_warn(f"QAT: the export at the end of training will fail. {error}")

    # ------------------------------------------------------------------ after training

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        use_weight_cache(pl_module, None)
        phase = self._phase
        if phase is not None and not phase.quantizing and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"QAT: training ended in phase {phase.name!r} after {self._batches_seen} of "
                f"{self.schedule.calibration_batches} calibration batches; the network never "
                "trained quantized. Train longer, or lower Schedule.quantize_from or "
                "calibration_batches."
            )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finish(pl_module)
        if self._export is None:
            return
        error: Exception | None = None
        if trainer.is_global_zero:
            try:
                self.delivered = self._export.make(
                    trainer,
                    pl_module,
                    self._inputs(pl_module),
                    self.recipe,
                    self.schedule.calibration_batches,
                )
                error = self._export.failure(self.delivered)
            except Exception as caught:
                error = caught
        # Every process learns how it went; none waits for one that has failed.
        message = trainer.strategy.broadcast(None if error is None else str(error))
        if message is None:
            return
        if self.on_export_error == "warn":
            rank_zero_warn(f"QAT: {message}")
        elif error is not None:
            raise error
        else:
            raise RuntimeError(f"The export on the first process failed: {message}")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        unwind()
        self._leave(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(pl_module)

    def _leave(self, pl_module: LightningModule) -> None:
        for call in self._calls:
            call.undo()
        self._calls = []
        self._quantizers = {}
        self._weights = QuantizedWeightCache()
        use_weight_cache(pl_module, None)
        release_batchnorms(pl_module)
        self._recorder.stop()

    # ------------------------------------------------------------------ checkpoints

    @property
    @override
    def state_key(self) -> str:
        """The same for subclasses: their checkpoints are exchangeable, and two of them are not."""
        return CALLBACK_KEY

    @override
    def state_dict(self) -> dict[str, Any]:
        """Primitives only, so that ``torch.load(weights_only=True)`` reads the checkpoint."""
        return {
            "version": STATE_VERSION,
            "recipe": self.recipe.to_dict(),
            "phase": None if self._phase is None else asdict(self._phase),
            "batches_seen": self._batches_seen,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Calibration goes on where it stood, and what was frozen stays so in a longer run."""
        self._batches_seen = int(state_dict["batches_seen"])
        phase = state_dict["phase"]
        self._phase = None if phase is None else Phase(**phase)


def _fitting(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit"


def _from_shape(example_inputs: Any) -> Any:
    """A list of ints, as YAML can give it, is the shape of one float tensor."""
    if isinstance(example_inputs, list) and all(isinstance(n, int) for n in example_inputs):
        return torch.zeros(example_inputs)
    return example_inputs
