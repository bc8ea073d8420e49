"""The exports at the end of ``fit``: tried before, then made of the chosen weights and reported."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_qat.callback.console import say
from lightning_qat.callback.example_inputs import verification_inputs
from lightning_qat.callback.export.finish_later import how_to_finish
from lightning_qat.callback.export.folder import folder_problem, rescued, space_warning
from lightning_qat.callback.export.options import ExportOptions
from lightning_qat.callback.export.trial_export import TrialFailed, shapes_in_words, try_exports
from lightning_qat.callback.lightning_private import implements_forward
from lightning_qat.callback.loggers import log_agreement
from lightning_qat.checkpoint.contents import was_quantizing
from lightning_qat.convert.convert import convert
from lightning_qat.export.delivery.export_all import export_all, refuse_repeated
from lightning_qat.export.delivery.manifest import MANIFEST
from lightning_qat.export.delivery.own_process import problem_of
from lightning_qat.export.delivery.result import Delivery, ExportResult, error_text
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import Exporter
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.report.page import REPORT, report_or_reason
from lightning_qat.torch_files.load import load_without_objects
from lightning_qat.training.calibrate_unseen import calibrate_unseen


class Export:
    """The exports of one run, checked before it starts and made after it."""

    def __init__(self, options: ExportOptions) -> None:
        self._options = options
        self._folder, self._source = options.folder, options.source
        self._loaded: tuple[Exporter, ...] = ()
        self._inputs: Any = None

    @property
    def targets(self) -> list[str]:
        """Names of the exporters, once ``problems`` has loaded them."""
        return [exporter.name for exporter in self._loaded]

    @property
    def folder(self) -> str | Path | None:
        """Where files go, once ``problems`` has looked."""
        return self._folder

    def problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """One message for each reason why the exports could not be made; loads the exporters."""
        problems = []
        loaded: list[Exporter] = []
        for exporter in self._options.exporters:
            try:
                loaded.append(load_exporter(exporter))
                loaded[-1].check_available()
                apart = problem_of(loaded[-1]) if self._options.timeout is not None else None
                problems += [] if apart is None else [apart]
            except (ValueError, TypeError, ImportError) as error:
                problems.append(str(error))
        self._loaded = tuple(loaded)
        try:
            refuse_repeated(loaded)
        except ValueError as error:
            problems.append(str(error))
        if not implements_forward(pl_module):
            problems.append(
                f"{type(pl_module).__name__} must implement forward(): it is what is exported. "
                "Add a forward that calls your network, and call self(...) in training_step."
            )
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return problems
        if self._source == "best" and _monitored(trainer) is None:
            problems.append(
                "export_from='best' needs a checkpoint callback that knows which one is best; got "
                "none with a monitor. Add ModelCheckpoint(monitor='val_loss') to the callbacks, or "
                "use export_from='last'."
            )
        self._folder = Path(
            self._folder or Path(trainer.log_dir or trainer.default_root_dir, "qat_export")
        )
        if trainer.is_global_zero:
            problem = folder_problem(self._folder)
            problems += [] if problem is None else [problem]
        return problems

    def try_it(self, trainer: Trainer, pl_module: LightningModule, inputs: Any) -> None:
        """Find out in the first minute, not after the last epoch, what would fail.

        The first process captures the untrained model and tries every exporter on it; every process
        must call this.

        Raises:
            CaptureError: ``forward`` cannot be captured; a warning with ``on_error="warn"``, as
                are the others.
            RuntimeError: Exporters failed; the message has all that they say.
        """
        error: BaseException | None = None
        if trainer.is_global_zero:
            self._warn_of_space(trainer, pl_module)
            # A network that is developed is exported a moment later anyway.
            developed = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
            try:
                try_exports(
                    _in_float32(pl_module),
                    inputs,
                    () if developed else self._loaded,
                    tries=self._options.trial,
                    dynamic_shapes=self._options.dynamic_shapes,
                    export_outputs=self._options.outputs,
                    timeout=self._options.timeout,
                )
            except BaseException as caught:  # the other processes wait to be told
                error = caught
        if isinstance(error, Exception) and self._options.on_error == "warn":
            error = TrialFailed(f"the export at the end of training will fail. {error}")
        self.share_failure(trainer, error)

    def make(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        inputs: Callable[[], Any],
        recorded: Any,
        recipe: Recipe,
        calibration_batches: int,
        facts: Callable[[LightningModule], Mapping[str, Any]],
    ) -> tuple[tuple[ExportResult, ...], BaseException | None]:
        """Convert a copy of the module and write every target; call it on the first process.

        Args:
            trainer: The trainer.
            pl_module: The trained module; it is not changed.
            inputs: Gives example inputs of its ``forward``, in float32.
            recorded: Inputs of its ``forward`` in training, to verify with; ``None``: there are
                none.
            recipe: The recipe it was prepared with.
            calibration_batches: Batches before a network counts as quantized, to judge the best
                checkpoint.
            facts: What the report shall say of the run.

        Returns:
            One result for each target, with its error if it failed; and one error that says all
            that failed, what is saved and how to finish, or what a signal has raised. Nothing is
            raised: the other processes wait to be told.
        """
        delivery: Delivery | None = None
        try:
            say("converting")
            model, quantized = self._converted(
                trainer, pl_module, inputs(), recorded, recipe, calibration_batches
            )
            real = verification_inputs(quantized, pl_module, recorded)
            training = _without_failing(facts, model)
            with self._folder_for(trainer) as folder:
                delivery = self._written(trainer, pl_module, quantized, folder, real, training)
        except Exception as error:
            failed = RuntimeError(
                f"nothing was exported: {error_text(error)}\n"
                + self._how_to_finish(trainer, pl_module, self.targets, None)
            )
            failed.__cause__ = error
            return (), failed
        except BaseException as interrupt:  # by a signal
            return (), interrupt
        told = self._tell(trainer, pl_module, delivery, quantized, real)
        return delivery.results, self._failure(trainer, pl_module, delivery, quantized) or told

    def _converted(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        inputs: Any,
        recorded: Any,
        recipe: Recipe,
        calibration_batches: int,
    ) -> tuple[LightningModule, QuantizedModel]:
        """The module with the chosen weights, and what it becomes."""
        model = self._chosen_weights(trainer, pl_module, calibration_batches)
        if model is not pl_module and recorded is not None:
            # A checkpoint from before the first validation.
            calibrate_unseen(model, recorded, agree=False)
        self._inputs = inputs
        return model, convert(
            _in_float32(model),
            inputs,
            recipe=recipe,
            dynamic_shapes=self._options.dynamic_shapes,
            export_outputs=self._options.outputs,
        )

    def _written(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        quantized: QuantizedModel,
        folder: Path,
        real: Any,
        training: Mapping[str, Any] | None,
    ) -> Delivery:
        """Every target's files and the manifest."""
        say(f"exporting {self.targets} to {folder}; {shapes_in_words(quantized)}")
        return export_all(
            *(quantized, self._loaded, folder, _file_name(pl_module)),
            check=self._options.verify,
            inputs=real,
            source=None if real is None else "inputs of the first training batch",
            training=training,
            timeout=self._options.timeout,
        )

    def _tell(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        delivery: Delivery,
        quantized: QuantizedModel,
        real: Any,
    ) -> BaseException | None:
        """Write the report and log; returns what a signal raises, or a warning that is an error."""
        try:
            tries = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
            if not (tries or delivery.interrupt or MANIFEST in delivery.unwritten):
                _report(
                    *(delivery.folder, quantized),
                    name=_file_name(pl_module),
                    inputs=real,
                    exporters=self._loaded,
                    compare=self._options.verify,
                )
            for result in delivery.results:
                _log(trainer, result)
        except BaseException as error:
            return error
        return None

    def _failure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        delivery: Delivery,
        quantized: QuantizedModel,
    ) -> BaseException | None:
        """One error that says all that failed and how to finish; ``None``: nothing failed."""
        problem = delivery.problem()
        if problem is None:
            return delivery.interrupt
        saved = delivery.model_file
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if saved is None:
                saved = rescued(quantized, f"{_file_name(pl_module)}.pt2", trainer)
            todo = delivery.failed or self.targets
            problem += "\n" + self._how_to_finish(trainer, pl_module, todo, saved)
        if delivery.interrupt is not None:
            # Ctrl-C ends the run without a word of ours.
            say(problem)
            return delivery.interrupt
        error = RuntimeError(problem)
        errors = [r.error for r in delivery.results if r.error is not None]
        error.__cause__ = [*errors, *delivery.unwritten.values()][0]
        return error

    def _how_to_finish(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        targets: Sequence[str],
        model_file: Path | None,
    ) -> str:
        assert self._folder is not None  # problems has looked
        try:
            return how_to_finish(
                *(trainer, pl_module, self._inputs, self._options),
                folder=Path(self._folder),
                targets=targets,
                model_file=model_file,
            )
        except Exception as error:  # of what it helps with, it must not cost the message
            return f"What is saved cannot be told: {error_text(error)}"

    def say_interrupted(self, trainer: Trainer, pl_module: LightningModule, inputs: Any) -> None:
        """Say that an interrupted run exports nothing, and how its last checkpoint is exported."""
        self._inputs = inputs
        finish = self._how_to_finish(trainer, pl_module, self.targets, None)
        say(f"interrupted, so nothing was exported. {finish}")

    def _warn_of_space(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or self._folder is None:  # type: ignore[attr-defined]
            return
        warning = space_warning(Path(self._folder), pl_module, len(self._loaded))
        if warning is not None:
            rank_zero_warn(f"QAT: {warning}")

    def share_failure(self, trainer: Trainer, error: BaseException | None) -> None:
        """Raise or warn on every process if the exports failed; every process must call it.

        Args:
            trainer: The trainer.
            error: The error of the first process, if any.

        Raises:
            BaseException: ``error`` on the first process, ``RuntimeError`` with its message on the
                others; a warning with ``on_error="warn"``, but for what a signal has raised.
        """
        interrupt = error is not None and not isinstance(error, Exception)
        said = None if error is None else (str(error) or error_text(error), interrupt)
        try:
            message, interrupted = trainer.strategy.broadcast(said) or (None, False)
        finally:
            if interrupt and error is not None:
                # Also where the others were interrupted too, and listen no more.
                raise error
        if message is None:
            return
        if self._options.on_error == "warn" and not interrupted:
            rank_zero_warn(f"QAT: {message}")
        elif error is not None:
            raise error
        else:
            raise RuntimeError(f"The export on the first process failed: {message}")

    def _chosen_weights(
        self, trainer: Trainer, pl_module: LightningModule, calibration_batches: int
    ) -> LightningModule:
        if self._source == "last" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return pl_module
        monitored = _monitored(trainer)
        assert monitored is not None
        path = monitored.best_model_path
        if not path:
            raise RuntimeError(
                f"export_from='best' needs a best checkpoint, but the monitored "
                f"{monitored.monitor!r} was never saved as one. Log it in validation_step, check "
                "that validation runs before training ends, or use export_from='last'. The trained "
                "weights are still in the trainer: export them with convert and export."
            )
        # The path may come from a checkpoint that the run was resumed from.
        checkpoint = load_without_objects(path)
        if not was_quantizing(checkpoint, calibration_batches):
            raise RuntimeError(
                f"The best checkpoint {path!r} was saved before the network was quantized, so its "
                "score is not that of the export. Use export_from='last', start quantizing earlier "
                "(Schedule.quantize_from, calibration_batches), or monitor from then on."
            )
        # Into a copy: the live weights stay what training ended with.
        best = copy.deepcopy(pl_module)
        best.load_state_dict(checkpoint["state_dict"])
        return best

    @contextmanager
    def _folder_for(self, trainer: Trainer) -> Iterator[Path]:
        """The export folder; a temporary one for ``fast_dev_run``, which tries, leaves nothing."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            with tempfile.TemporaryDirectory(prefix="qat_export_") as temporary:
                yield Path(temporary)
        else:
            assert isinstance(self._folder, Path)
            yield self._folder


def _without_failing(
    facts: Callable[[LightningModule], Mapping[str, Any]], model: LightningModule
) -> Mapping[str, Any] | None:
    """What the report shall say of the run; ``None``, and a warning, if that cannot be told."""
    try:
        return facts(model)
    except Exception as error:  # of the export it must not cost
        rank_zero_warn(
            f"QAT: {REPORT} will say nothing of the training: {type(error).__name__}: {error}. "
            "The exports do not depend on it."
        )
    return None


def _log(trainer: Trainer, result: ExportResult) -> None:
    """Log what came of a target; a logger that fails, as on a full disk, costs a warning."""
    try:
        log_agreement(trainer, result)
    except Exception as error:  # of any logger
        rank_zero_warn(f"QAT: a logger failed to log {result.target}: {error_text(error)}")


def _file_name(pl_module: LightningModule) -> str:
    """How the names of all files begin."""
    return type(pl_module).__name__.lower()


def _report(folder: Path, model: QuantizedModel, **options: Any) -> None:
    """Write the report; that it fails costs a warning."""
    problem = report_or_reason(folder, model, **options)
    if problem is None:
        say(f"report: {folder / REPORT}")
    else:
        rank_zero_warn(f"QAT: {problem}")


def _monitored(trainer: Trainer) -> ModelCheckpoint | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            return callback
    return None


def _in_float32(pl_module: LightningModule) -> LightningModule:
    """The module, or a float32 copy of one that trained in another precision: files are float32."""
    if all(p.dtype == torch.float32 for p in pl_module.parameters()):
        return pl_module
    return copy.deepcopy(pl_module).float()
