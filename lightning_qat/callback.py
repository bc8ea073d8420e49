"""``QATCallback``: Lightning's hooks, translated into prepare, phases, convert and export."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_qat.callback_checks import environment_problems
from lightning_qat.convert import check_capture, convert
from lightning_qat.delivery import Delivered, deliver, refuse_repeated
from lightning_qat.discovery import finish_plan
from lightning_qat.export import Exporter, load_exporter
from lightning_qat.input_recorder import InputRecorder
from lightning_qat.interception import unwind
from lightning_qat.join_plan import plan_of
from lightning_qat.layers import QATLayer
from lightning_qat.phases import (
    activation_quantizers,
    apply_phase,
    commit_ranges,
    drop_pending,
    finish,
    release_batchnorms,
    set_observing,
)
from lightning_qat.prepare import PrepareReport, plan, prepare, swap
from lightning_qat.recipe import Recipe
from lightning_qat.schedule import Milestones, Phase, Schedule

STATE_VERSION = 1

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
            checkpoint callback's best checkpoint.
        example_inputs: What ``forward`` takes: a tensor, a tuple of positional arguments or a
            mapping of keyword arguments; a list of ints is the shape of one float tensor. By
            default ``example_input_array``, else the inputs of the first ``forward`` in training.
        verify: Compare every file with the trained model, on the example inputs.
        on_export_error: ``raise`` after all other targets are written, or ``warn``.

    Raises:
        ValueError: An unknown recipe, key or option.

    Example::

        trainer = Trainer(callbacks=[QATCallback("int8", exporters=["fake_quant_onnx", "cann"])])
        trainer.fit(module, datamodule)
    """

    def __init__(
        self,
        recipe: str | Recipe | dict[str, Any] = "int8",
        schedule: Schedule | None = None,
        exporters: Sequence[str | Exporter] = (),
        export_dir: str | Path | None = None,
        export_from: Literal["last", "best"] = "last",
        example_inputs: Any = None,
        verify: bool = True,
        on_export_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        if isinstance(exporters, str):
            raise ValueError(
                f"exporters must be a list; got {exporters!r}. Write exporters=[{exporters!r}]."
            )
        if export_from not in ("last", "best"):
            raise ValueError(f"export_from must be 'last' or 'best'; got {export_from!r}.")
        if on_export_error not in ("raise", "warn"):
            raise ValueError(f"on_export_error must be 'raise' or 'warn'; got {on_export_error!r}.")
        self.recipe = Recipe.load(recipe)
        self.schedule = schedule or Schedule()
        self.exporters = tuple(exporters)
        self.export_dir = export_dir
        self.export_from = export_from
        self.example_inputs = _from_shape(example_inputs)
        self.verify = verify
        self.on_export_error = on_export_error
        self.report: PrepareReport | None = None
        """What was quantized, once ``fit`` has started."""
        self.delivered: tuple[Delivered, ...] = ()
        """What was exported, once ``fit`` has ended."""
        self._loaded: tuple[Exporter, ...] = ()
        self._folder: Path | None = None
        self._milestones: Milestones | None = None
        self._phase: Phase | None = None
        self._batches_seen = 0
        self._recorder = InputRecorder()

    # ------------------------------------------------------------------ before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        problems = environment_problems(trainer, pl_module, self)
        if stage == "fit" and self.exporters:
            problems += self._export_problems(trainer, pl_module)
        if problems:
            raise MisconfigurationException("\n".join(problems))
        # Layers that __init__ and earlier hooks made; LM.setup and configure_model may make more.
        first = plan(pl_module, self.recipe, check_patterns=False)
        swap(pl_module, first)
        self._install_second_pass(pl_module, first)

    def _install_second_pass(self, pl_module: LightningModule, first: PrepareReport) -> None:
        """Swap once more after ``configure_model``, the last step before a checkpoint is restored.

        No callback hook runs there, so the instance's own ``configure_model`` is wrapped for one
        call.
        """
        original: Callable[[], None] = pl_module.configure_model

        def configure_model() -> None:
            del pl_module.__dict__["configure_model"]
            original()
            self._prepare(pl_module, first)

        pl_module.__dict__["configure_model"] = configure_model

    def _prepare(self, pl_module: LightningModule, first: PrepareReport) -> None:
        inputs = self._inputs(pl_module)
        self.report = prepare(pl_module, self.recipe, inputs).after(first)
        for quantizer in activation_quantizers(pl_module).values():
            quantizer.deferred, quantizer.observing = True, False

    def _export_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        problems = []
        loaded: list[Exporter] = []
        for exporter in self.exporters:
            try:
                loaded.append(load_exporter(exporter))
                loaded[-1].check_available()
            except (ValueError, TypeError, ImportError) as error:
                problems.append(str(error))
        self._loaded = tuple(loaded)
        try:
            refuse_repeated(loaded)
        except ValueError as error:
            problems.append(str(error))
        if not is_overridden("forward", pl_module, LightningModule):
            problems.append(
                f"{type(pl_module).__name__} must implement forward(): it is what is exported. "
                "Add a forward that calls your network, and call self(...) in training_step."
            )
        folder = self.export_dir or Path(trainer.log_dir or trainer.default_root_dir, "qat_export")
        self._folder = Path(folder)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self._folder).close()
            except OSError as error:
                problems.append(
                    f"The export directory {str(self._folder)!r} must be writable: {error}. "
                    "Choose another one with export_dir."
                )
        return problems

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._audit(pl_module)
        try:
            self._milestones = self.schedule.resolve(self._run_length(trainer))
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if self.report is not None:
            rank_zero_info(f"QAT: {self.report}")
        if not self._loaded:
            return
        if self._inputs(pl_module) is None:
            self._recorder.start(pl_module)
        else:
            self._check_capture(pl_module)

    def _audit(self, pl_module: LightningModule) -> None:
        """Refuse layers that came too late to be swapped: they would train in float, silently."""
        late = plan(pl_module, self.recipe, check_patterns=False).swapped
        if late or not any(isinstance(m, QATLayer) for m in pl_module.modules()):
            names = ", ".join(repr(layer.name) for layer in late) or "all of them"
            raise MisconfigurationException(
                "Every layer that the recipe selects must exist when training is set up; these "
                f"were made or replaced later: {names}. Make layers in __init__, setup() or "
                "configure_model(), not in on_fit_start."
            )

    def _run_length(self, trainer: Trainer) -> float:
        """Epochs or optimizer steps of the run; infinite when it has no end."""
        if not self.schedule.has_fractions:
            return math.inf
        steps = float(trainer.estimated_stepping_batches)
        if self.schedule.interval == "step":
            return steps
        epochs = math.inf
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            epochs = trainer.max_epochs
        if math.isfinite(steps) and trainer.max_steps > 0:
            # Not yet done where max_steps alone limits the run.
            trainer.fit_loop.setup_data()
            per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            epochs = min(epochs, math.ceil(steps / max(per_epoch, 1)))
        return epochs

    # ------------------------------------------------------------------ training

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What a learning-rate search observed is not part of this run.
        drop_pending(pl_module)
        self._phase = None
        self._enter_phase(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter_phase(trainer, pl_module)

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
        finish_plan(pl_module)
        if phase.observing:
            commit_ranges(pl_module)
        if phase.name != "float":
            self._batches_seen += 1
        if self.report is not None and self.report.joins is None:
            self._take_plan(pl_module)
        if not trainer.barebones:
            pl_module.log("qat/phase", float(phase.index), on_step=True, on_epoch=False)
        if self._recorder.recording:
            self._require_inputs(pl_module)

    def _take_plan(self, pl_module: LightningModule) -> None:
        """After the first batch, whose forward has made the plan."""
        if self.report is None or not (self.recipe.joins or self.recipe.outputs):
            return
        joins = plan_of(pl_module)
        if joins is None:
            raise MisconfigurationException(
                f"training_step must call the module itself, so that {type(pl_module).__name__}"
                ".forward shows which tensors to quantize. Call self(...) in training_step, set "
                "example_input_array, pass QATCallback(example_inputs=...), or use a recipe with "
                "joins=False and outputs=False."
            )
        self.report = replace(self.report, joins=joins)
        rank_zero_info(f"QAT: {joins}")

    def _enter_phase(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._milestones is not None
        epochs = self.schedule.interval == "epoch"
        position = trainer.current_epoch if epochs else trainer.global_step
        phase = self._milestones.phase_at(position, self._batches_seen)
        if phase == self._phase:
            return
        if self._phase is None or phase.name != self._phase.name:
            rank_zero_info(
                f"QAT: epoch {trainer.current_epoch}, step {trainer.global_step}: {phase.name} "
                f"({_PHASE_LINES[phase.name]})"
            )
        apply_phase(pl_module, phase)
        self._phase = phase

    # Observers see training batches only: quantizers check self.training, and the gate is closed
    # as well, for modules that evaluate in train mode (Monte-Carlo dropout).

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_observing(activation_quantizers(pl_module).values(), False)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_observing(activation_quantizers(pl_module).values(), False)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        phase = None if trainer.sanity_checking else self._phase
        observing = phase is not None and phase.observing
        set_observing(activation_quantizers(pl_module).values(), observing)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_observing(activation_quantizers(pl_module).values(), False)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_observing(activation_quantizers(pl_module).values(), False)

    # ------------------------------------------------------------------ example inputs

    def _inputs(self, pl_module: LightningModule) -> Any:
        """The example inputs as far as they are known by now."""
        for inputs in (self.example_inputs, pl_module.example_input_array, self._recorder.inputs):
            if inputs is not None:
                return inputs
        return None

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
        try:
            check_capture(pl_module, self._inputs(pl_module))
        except RuntimeError as error:
            if self.on_export_error == "raise":
                raise
            rank_zero_warn(f"QAT: the export at the end of training will fail. {error}")

    # ------------------------------------------------------------------ after training

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finish(pl_module)
        if not self._loaded:
            return
        error: Exception | None = None
        if trainer.is_global_zero:
            try:
                self._export(trainer, pl_module)
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

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._folder is not None
        rank_zero_info("QAT: converting")
        model = self._module_to_export(trainer, pl_module)
        quantized = convert(model, self._inputs(pl_module), recipe=self.recipe)
        with _export_folder(trainer, self._folder) as folder:
            rank_zero_info(f"QAT: exporting {[e.name for e in self._loaded]} to {folder}")
            name = type(pl_module).__name__.lower()
            quantized.save(folder / f"{name}.pt2")
            self.delivered = deliver(quantized, self._loaded, folder, name, check=self.verify)
        for result in self.delivered:
            if result.agreement is not None:
                rank_zero_info(f"QAT: {result.agreement}")
                self._log_agreement(trainer, result)
        failed = [result for result in self.delivered if result.error is not None]
        if failed:
            lines = "\n".join(f"{r.target}: {type(r.error).__name__}: {r.error}" for r in failed)
            raise RuntimeError(
                f"{len(failed)} of {len(self.delivered)} exports failed; the others are in "
                f"{str(self._folder)!r}.\n{lines}"
            ) from failed[0].error

    def _module_to_export(self, trainer: Trainer, pl_module: LightningModule) -> LightningModule:
        if self.export_from == "last":
            return pl_module
        path = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not path:
            rank_zero_warn(
                "QAT: export_from='best', but there is no best checkpoint (ModelCheckpoint with "
                "monitor=...); the weights that training ended with are exported."
            )
            return pl_module
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        phase = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("phase", "float")
        if phase in ("float", "calibrate"):
            raise RuntimeError(
                f"The best checkpoint {path!r} was saved in phase {phase!r}, before the network "
                "was quantized, so its score is not that of the export. Use export_from='last', "
                "or start quantizing earlier (Schedule.quantize_from)."
            )
        # Into a copy: the live weights stay what training ended with.
        best = copy.deepcopy(pl_module)
        best.load_state_dict(checkpoint["state_dict"])
        return best

    def _log_agreement(self, trainer: Trainer, result: Delivered) -> None:
        agreement = result.agreement
        assert agreement is not None
        if agreement.runtimes:
            metrics = {f"qat/{result.target}/max_steps": agreement.max_steps}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

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
        pl_module.__dict__.pop("configure_model", None)
        release_batchnorms(pl_module)
        self._recorder.stop()

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Primitives only, so that ``torch.load(weights_only=True)`` reads the checkpoint."""
        return {
            "version": STATE_VERSION,
            "recipe": self.recipe.to_dict(),
            "phase": "float" if self._phase is None else self._phase.name,
            "batches_seen": self._batches_seen,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Calibration goes on where it stood; the phase itself follows from the position."""
        self._batches_seen = int(state_dict["batches_seen"])


@contextmanager
def _export_folder(trainer: Trainer, folder: Path) -> Iterator[Path]:
    """The export folder; a temporary one for ``fast_dev_run``, which tries and leaves nothing."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        with tempfile.TemporaryDirectory(prefix="qat_export_") as temporary:
            yield Path(temporary)
    else:
        yield folder


def _from_shape(example_inputs: Any) -> Any:
    """A list of ints, as YAML can give it, is the shape of one float tensor."""
    if isinstance(example_inputs, list) and all(isinstance(n, int) for n in example_inputs):
        return torch.zeros(example_inputs)
    return example_inputs
