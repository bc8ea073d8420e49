"""``QATCallback``: Lightning's hooks, translated into prepare, phases, convert and export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_qat.callback.common_plan import common_plan
from lightning_qat.callback.console import say, say_list
from lightning_qat.callback.example_inputs import ExampleInputs
from lightning_qat.callback.export.final_export import Export
from lightning_qat.callback.export.options import ExportOptions, check_options
from lightning_qat.callback.lightning_private import (
    after_configure_model,
    before_checkpoint_is_read,
    before_weights_are_loaded,
    configuration_error,
    is_fitting,
    resume_train_data,
)
from lightning_qat.callback.loggers import check_interval
from lightning_qat.callback.patch_once import PatchOnce
from lightning_qat.callback.phase_hooks import PhaseHooks
from lightning_qat.callback.run_length import resolve
from lightning_qat.callback.trainer_checks import (
    bystander_hints,
    check_checkpoint,
    data_parallel_problems,
    eval_mode_problem,
    late_layer_problems,
    learning_rate_problem,
    require_readable,
    trainer_problems,
)
from lightning_qat.callback.unseen_ranges import UnseenRanges
from lightning_qat.checkpoint.contents import CALLBACK_KEY, STATE_VERSION, has_ranges
from lightning_qat.export.delivery.result import ExportResult
from lightning_qat.export.protocol import Exporter
from lightning_qat.function_hooks.running import forget_running
from lightning_qat.joins.first_forward import finish_plan, is_waiting_for_forward
from lightning_qat.model.paths import ModelPaths
from lightning_qat.numerics.ways import way_on
from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.prepare.swap import choose_layers, swap
from lightning_qat.quantizers.switches import switch
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.schedule import Schedule
from lightning_qat.recipe.typed_dicts import RecipeKeys
from lightning_qat.report.run_record import run_facts
from lightning_qat.training.phases import check_memory, finish
from lightning_qat.training.range_sync import activation_quantizers


class QATCallback(PhaseHooks):
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
        verify: Compare every file with the trained model, on inputs of the first training batch
            (at most 32 samples) where ``training_step`` calls the module itself, else on the
            example inputs.
        on_export_error: ``raise`` after all other targets are written, or ``warn``.
        trial_export: Try every exporter on the untrained model, in a temporary folder, before
            training (after the first batch where inputs are not known before), and raise or warn
            of everything that a target cannot express. It takes what the exports take, or about a
            minute: what would take longer is left out. ``False``: only the capture is tried.
        export_outputs: Names of the outputs of ``forward`` to export, such as ``["logits"]``; with
            the others go inputs that only they need, such as labels. By default all.
        dynamic_shapes: Which dimensions of the inputs are dynamic in the files, as
            ``torch.export.export`` takes them; by default the batch.
        float_learning_rate: What the float training began with. When given, a learning rate far
            above a hundredth of it, with which fine-tuning should start, is warned of.
        memory: ``compact`` lets training keep less for backward than float training does, at some
            cost in time; see ``prepare``.
        log: Send the quantizers of every so many optimizer steps to the trainer's loggers: ranges,
            shares that are clipped, scales and SQNR of weights, and histograms where the logger has
            them, as ``qat/...``. By default nothing but the phase is logged.
        export_timeout: Seconds that each target may take, its comparison included. Each then runs
            in a process of its own, so that one that hangs or crashes costs only itself; that takes
            a start of Python and the model's memory once more. By default there is no limit, and
            exporters run in the training's process.

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
        trial_export: bool = True,
        export_outputs: Sequence[str] | None = None,
        dynamic_shapes: Any = None,
        log: int | None = None,
        export_timeout: float | None = None,
    ) -> None:
        check_options(exporters, export_from, on_export_error, export_outputs, export_timeout)
        if float_learning_rate is not None and not float_learning_rate > 0:
            raise ValueError(
                f"float_learning_rate must be positive or None; got {float_learning_rate!r}."
            )
        check_memory(memory)
        check_interval(log)
        self.recipe = Recipe.load(recipe)
        self.schedule = schedule or Schedule()
        self.exporters = tuple(exporters)
        self.export_dir = export_dir
        self.export_from: Literal["last", "best"] = export_from
        self._inputs = ExampleInputs(example_inputs)
        self.verify = verify
        self.on_export_error = on_export_error
        self.float_learning_rate = float_learning_rate
        self.memory: Literal["fast", "compact"] = memory
        self.trial_export = trial_export
        self.export_outputs = export_outputs
        self.dynamic_shapes = dynamic_shapes
        self.export_timeout = export_timeout
        self.report: PrepareReport | None = None
        """The layers and joins that are quantized, once ``fit`` has started."""
        self.delivered: tuple[ExportResult, ...] = ()
        """The result of each export, once ``fit`` has ended."""
        self._export: Export | None = None
        self._patches: list[PatchOnce] = []
        self._first_batch = True
        self._unseen = UnseenRanges()
        # Set while the first batch runs without torch.compile.
        self._eager: Any = None
        super().__init__(self.schedule, log)

    @property
    def example_inputs(self) -> Any:
        """The inputs that were given, if any."""
        return self._inputs.given

    @example_inputs.setter
    def example_inputs(self, inputs: Any) -> None:
        self._inputs.given = inputs

    # ------------------------------------------------------------------ before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._inputs.forget()
        self._export = None
        inputs_known = self._inputs.before_training(pl_module) is not None
        problems = trainer_problems(
            trainer, pl_module, self, self.recipe, self.schedule, inputs_known
        )
        if stage == "fit":
            self.delivered = ()
        if stage == "fit" and self.exporters:
            self._export = Export(
                ExportOptions(
                    self.exporters,
                    self.export_dir,
                    self.export_from,
                    self.verify,
                    self.on_export_error,
                    self.trial_export,
                    self.export_outputs,
                    self.dynamic_shapes,
                    self.export_timeout,
                )
            )
            problems += self._export.problems(trainer, pl_module)
        if problems:
            raise configuration_error("\n".join(problems))
        if stage == "fit" and trainer.global_step == 0:
            self._phases.start_anew()
        # Layers that __init__ and earlier hooks made. setup and configure_model of the module may
        # make more, and prepare swaps those; it knows the last layer only when all are there.
        early = PrepareReport((), ())
        if self.recipe.first_last is None:
            paths = ModelPaths.of(pl_module)
            early = choose_layers(paths, self.recipe, check_patterns=False)
            swap(paths, early)

        def prepare_all() -> None:
            self._prepare(pl_module, early)

        def check(checkpoint: Mapping[str, Any]) -> None:
            check_checkpoint(trainer, pl_module, checkpoint, self.recipe)

        self._patches = [
            after_configure_model(pl_module, prepare_all),
            before_weights_are_loaded(pl_module, check),
            before_checkpoint_is_read(trainer, require_readable),
        ]

    def _prepare(self, pl_module: LightningModule, early: PrepareReport) -> None:
        inputs = self._inputs.known(pl_module)
        report = prepare(pl_module, self.recipe, inputs, self.memory).after(early)
        self.report = report.with_plan(report.joins)
        self._gate.open = False
        switch(pl_module, deferred=True, observing=False, gate=self._gate)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        problems = data_parallel_problems(pl_module)
        if problems:
            raise configuration_error("\n".join(problems))
        self._refuse_late_layers(pl_module)
        self._first_batch, self._unseen = True, UnseenRanges()
        try:
            self._set_milestones(trainer, pl_module)
        except ValueError as error:
            raise configuration_error(str(error)) from error
        in_eval = eval_mode_problem(pl_module)
        if in_eval is not None:
            rank_zero_warn(in_eval)
        if self.report is not None:
            self._say_report(trainer, str(self.report), self.report.summary())
            for hint in bystander_hints(pl_module, self.report, self.recipe):
                say(hint)
        say(f"quantizers run as {way_on(pl_module.device)}")
        if self._export is None:
            return
        inputs = self._inputs.known(pl_module)
        # Recorded in any case: files are compared on what training saw.
        self._inputs.record(pl_module, self._gate)
        if inputs is not None:
            self._export.try_it(trainer, pl_module, inputs)

    def _set_milestones(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = self._phases.start or (0, 0)
        self._phases.set_milestones(resolve(self.schedule, trainer, pl_module, start))

    # ------------------------------------------------------------------ training

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resume_train_data(trainer)
        if self.float_learning_rate is not None:
            problem = learning_rate_problem(trainer, self.float_learning_rate)
            if problem is not None:
                rank_zero_warn(problem)
        if self._phases.start is None:
            self._phases.start = trainer.current_epoch, trainer.global_step
            if any(self._phases.start):
                # The trainer has trained in float before, or a float checkpoint has.
                self._set_milestones(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._first_batch:
            # Hooks of the module itself run after those of callbacks.
            self._refuse_late_layers(pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if is_waiting_for_forward(pl_module):
            # A graph of the whole step would begin outside the forward that makes the plan.
            self._eager = torch.compiler.set_stance("force_eager")

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._end_eager()
        finish_plan(pl_module)
        self._report_plan(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._first_batch:
            self._first_batch = False
            self._refuse_late_layers(pl_module)
            self._unseen.report(self._quantizers)
        if self._inputs.recording and self._export is not None:
            self._inputs.stop()
            if self._inputs.before_training(pl_module) is None:
                self._export.try_it(trainer, pl_module, self._inputs.required(pl_module))

    def _report_plan(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the plan of the joins after the first batch, if its forward had to make it."""
        planned = self.recipe.joins or self.recipe.outputs
        if self.report is None or self.report.joins is not None or not planned:
            return
        joins = common_plan(trainer, pl_module)
        self.report = self.report.with_plan(joins)
        self._quantizers = activation_quantizers(pl_module)
        self._say_report(trainer, str(joins), joins.summary())

    def _say_report(self, trainer: Trainer, text: str, summary: str) -> None:
        """Log a list; every process must call it, for Lightning agrees on the log's folder."""
        folder = self._export.folder if self._export is not None else None
        folder = folder or trainer.log_dir or trainer.default_root_dir
        if trainer.is_global_zero:
            tries = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
            say_list(text, summary, None if tries else Path(folder), str(self.report))

    def _refuse_late_layers(self, pl_module: LightningModule) -> None:
        problems = late_layer_problems(pl_module, self.recipe)
        if problems:
            raise configuration_error("\n".join(problems))

    # ------------------------------------------------------------------ evaluation

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        phase = self._phases.phase
        if is_fitting(trainer) and phase is not None and phase.quantizing:
            self._unseen.calibrate(pl_module, self._inputs.training())

    # ------------------------------------------------------------------ after training

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not has_ranges(pl_module) and self._phases.phase is None:
            self._refuse_no_batch(trainer, pl_module)
        finish(pl_module)
        self._inputs.stop()
        self._inputs.recall(pl_module)
        self._inputs.keep(pl_module)
        if self._export is None:
            return
        late = late_layer_problems(pl_module, self.recipe)
        if late:
            rank_zero_warn(f"QAT: {late[0]} They are float in the files.")
        # Anew, with the weights that training ends with.
        self._unseen.calibrate(pl_module, self._inputs.training(), anew=True)
        self._unseen.report_calibrated()
        error: BaseException | None = None
        if trainer.is_global_zero:
            self.delivered, error = self._export.make(
                trainer,
                pl_module,
                partial(self._inputs.required, pl_module),
                self._inputs.training(),
                self.recipe,
                self.schedule.calibration_batches,
                partial(run_facts, report=self.report, record=self._record),
            )
        self._export.share_failure(trainer, error)

    def _refuse_no_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A float checkpoint whose epochs are used up, or a run without batches."""
        problem = (
            "No training batch ran, so nothing was observed or quantized: the run ended at epoch "
            f"{trainer.current_epoch} (max_epochs={trainer.max_epochs}), step "
            f"{trainer.global_step} (max_steps={trainer.max_steps}). A checkpoint given as "
            "ckpt_path brings its epochs along: train for more, or load its weights, "
            f"{type(pl_module).__name__}.load_from_checkpoint(path), and fit without ckpt_path."
        )
        if self._export is not None:
            raise configuration_error(problem)
        rank_zero_warn(f"QAT: {problem}")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        forget_running()
        if isinstance(exception, KeyboardInterrupt) and self._export and not self.delivered:
            self._export.say_interrupted(trainer, pl_module, self._inputs.known(pl_module))
        self._leave(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(pl_module)

    def _end_eager(self) -> None:
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
            self._eager = None

    def _leave(self, pl_module: LightningModule) -> None:
        self._end_eager()
        for patch in self._patches:
            patch.undo()
        self._patches = []
        self._inputs.stop()
        self._release(pl_module)

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
            **self._phases.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Calibration goes on where it stood, and what was frozen stays so in a longer run."""
        self._phases.load_state_dict(state_dict)
