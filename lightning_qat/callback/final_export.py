"""The exports at the end of ``fit``: tried before, then made of the chosen weights and reported."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_qat.callback.console import say
from lightning_qat.callback.example_inputs import verification_inputs
from lightning_qat.callback.lightning_private import implements_forward
from lightning_qat.callback.loggers import log_agreement
from lightning_qat.callback.trial_export import TrialFailed, shapes_in_words, try_exports
from lightning_qat.checkpoint.contents import was_quantizing
from lightning_qat.convert.convert import convert
from lightning_qat.export.load import load_exporter
from lightning_qat.export.manifest import ExportResult, export_all, refuse_repeated
from lightning_qat.export.protocol import Exporter
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.report.page import REPORT, report_or_reason
from lightning_qat.torch_files.load import load_without_objects
from lightning_qat.training.calibrate_unseen import calibrate_unseen


@dataclass(frozen=True)
class ExportOptions:
    """What a run is to export; see ``QATCallback``.

    Args:
        exporters: Names or exporters.
        folder: Where files go; ``None``: ``qat_export`` in the logger's folder.
        source: ``last`` or ``best``.
        verify: Compare every file with the trained model.
        on_error: ``raise`` an export's error, or ``warn`` of it.
        trial: Try the exporters on the untrained model.
        outputs: Names of the outputs to export; ``None``: all.
        dynamic_shapes: As for ``convert``.
    """

    exporters: Sequence[str | Exporter]
    folder: str | Path | None
    source: Literal["last", "best"]
    verify: bool
    on_error: str
    trial: bool
    outputs: Sequence[str] | None
    dynamic_shapes: Any


class Export:
    """The exports of one run, checked before it starts and made after it."""

    def __init__(self, options: ExportOptions) -> None:
        self._options = options
        self._folder, self._source = options.folder, options.source
        self._loaded: tuple[Exporter, ...] = ()

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
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self._folder).close()
            except OSError as error:
                problems.append(
                    f"The export directory {str(self._folder)!r} must be writable: {error}. "
                    "Choose another one with export_dir."
                )
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
        error: Exception | None = None
        if trainer.is_global_zero:
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
                )
            except Exception as caught:
                error = caught
        if error is not None and self._options.on_error == "warn":
            error = TrialFailed(f"the export at the end of training will fail. {error}")
        self.share_failure(trainer, error)

    def make(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        inputs: Any,
        recorded: Any,
        recipe: Recipe,
        calibration_batches: int,
        facts: Callable[[LightningModule], Mapping[str, Any]],
    ) -> tuple[ExportResult, ...]:
        """Convert a copy of the module and write every target; call it on the first process.

        Args:
            trainer: The trainer.
            pl_module: The trained module; it is not changed.
            inputs: Example inputs of its ``forward``, in float32.
            recorded: Inputs of its ``forward`` in training, to verify with; ``None``: there are
                none.
            recipe: The recipe it was prepared with.
            calibration_batches: Batches before a network counts as quantized, to judge the best
                checkpoint.
            facts: What the report shall say of the run.

        Returns:
            One result for each target, with its error if it failed.

        Raises:
            RuntimeError: The best checkpoint is missing, or from before the network was quantized.
        """
        say("converting")
        model = self._chosen_weights(trainer, pl_module, calibration_batches)
        if model is not pl_module and recorded is not None:
            # A checkpoint from before the first validation.
            calibrate_unseen(model, recorded, agree=False)
        quantized = convert(
            _in_float32(model),
            inputs,
            recipe=recipe,
            dynamic_shapes=self._options.dynamic_shapes,
            export_outputs=self._options.outputs,
        )
        check = self._options.verify
        real = verification_inputs(quantized, pl_module, recorded)
        with self._folder_for(trainer) as folder:
            say(
                f"exporting {[e.name for e in self._loaded]} to {folder}; "
                f"{shapes_in_words(quantized)}"
            )
            name = type(pl_module).__name__.lower()
            quantized.save(folder / f"{name}.pt2")
            source = None if real is None else "inputs of the first training batch"
            results = export_all(
                *(quantized, self._loaded, folder, name),
                check=check,
                inputs=real,
                source=source,
                training=_without_failing(facts, model),
            )
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                _report(folder, quantized, name, inputs=real, exporters=self._loaded, compare=check)
        for result in results:
            log_agreement(trainer, result)
        return results

    def failure(self, results: Sequence[ExportResult]) -> RuntimeError | None:
        """One error that names every target that failed; ``None`` if none did."""
        failed = [result for result in results if result.error is not None]
        if not failed:
            return None
        lines = "\n".join(f"{r.target}: {type(r.error).__name__}: {r.error}" for r in failed)
        error = RuntimeError(
            f"{len(failed)} of {len(results)} exports failed; the others are in "
            f"{str(self._folder)!r}.\n{lines}"
        )
        error.__cause__ = failed[0].error
        return error

    def share_failure(self, trainer: Trainer, error: Exception | None) -> None:
        """Raise or warn on every process if the exports failed; every process must call it.

        Args:
            trainer: The trainer.
            error: The error of the first process, if any.

        Raises:
            Exception: ``error`` on the first process, ``RuntimeError`` with its message on the
                others; a warning with ``on_error="warn"``.
        """
        message = trainer.strategy.broadcast(None if error is None else str(error))
        if message is None:
            return
        if self._options.on_error == "warn":
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


def _report(folder: Path, model: QuantizedModel, name: str, **options: Any) -> None:
    """Write the report; that it fails costs a warning."""
    problem = report_or_reason(folder, model, name=name, **options)
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
