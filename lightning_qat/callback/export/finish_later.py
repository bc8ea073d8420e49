"""What is saved of a run whose export failed, and the commands that finish it."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_qat.callback.export.options import ExportOptions
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import Exporter
from lightning_qat.torch_files.load import UntrustedObjects, load_saved, load_without_objects


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a run has written.

    Args:
        path: The file.
        step: Optimizer steps until then; -1: it does not say.
        plain: It holds tensors and plain values only.
    """

    path: str
    step: int
    plain: bool


def how_to_finish(
    trainer: Trainer,
    pl_module: LightningModule,
    inputs: Any,
    options: ExportOptions,
    *,
    folder: Path,
    targets: Sequence[str],
    model_file: Path | None,
) -> str:
    """What is saved, and the commands that export it, in lines.

    Args:
        trainer: The trainer, whose run has ended or was interrupted.
        pl_module: The trained module.
        inputs: Example inputs of its ``forward``; ``None``: they are not known.
        options: What was to be exported.
        folder: Where the files were to go.
        targets: What is left to do.
        model_file: Where the converted model is saved; ``None``: nowhere.
    """
    checkpoint = _checkpoint(trainer, options.source)
    lines = [_what_is_saved(trainer, checkpoint, model_file)]
    known, own = _by_command(options.exporters, targets)
    prefix = folder.absolute() / type(pl_module).__name__.lower()
    commands = []
    if known and model_file is not None:
        path = str(model_file)
        name = [] if model_file.stem == prefix.name else ["--name", prefix.name]
        commands.append(_joined(["lightning-qat", "export", path], known, prefix.parent, name))
    if known and checkpoint is not None:
        commands.append(_from_checkpoint(checkpoint, pl_module, inputs, known, prefix, trainer))
    if commands:
        lines.append("To finish the export:")
        lines.append("\n  or, from the checkpoint:\n".join(f"  {c}" for c in commands))
    source = None if model_file is None else f"QuantizedModel.load({str(model_file)!r})"
    if source is None and checkpoint is not None:
        module = f"load_qat_checkpoint({type(pl_module).__name__}, {checkpoint.path!r})"
        source = f"convert({module}, example_inputs)"
    if own and source is not None:
        lines.append(
            f"Exporters with options, or of your own ({', '.join(own)}), are finished in Python: "
            f"export({source}, exporter, {str(prefix)!r})"
        )
    return "\n".join(lines)


def _what_is_saved(trainer: Trainer, checkpoint: Checkpoint | None, model_file: Path | None) -> str:
    saved = []
    if model_file is not None:
        saved.append(f"the converted model is {str(model_file)!r}")
    if checkpoint is not None:
        of = "" if checkpoint.step < 0 else f", of step {checkpoint.step} of {trainer.global_step}"
        saved.append(f"the newest checkpoint is {checkpoint.path!r}{of}")
    text = f"Saved: {'; '.join(saved)}." if saved else "No checkpoint was saved."
    if checkpoint is None or checkpoint.step != trainer.global_step:
        text += (
            " The trained module is still in memory while this process lives (in a notebook, or "
            "where fit is called within try): trainer.save_checkpoint('trained.ckpt') saves it."
        )
    return text


def _checkpoint(trainer: Trainer, source: str) -> Checkpoint | None:
    """The newest checkpoint of this run, or the best one if that is what is exported."""
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    paths = [p for c in saved for p in (c.last_model_path, *c.best_k_models, c.best_model_path)]
    if source == "best":
        paths = [c.best_model_path for c in saved if c.monitor is not None][:1] or paths
    found = [_read(str(Path(path).absolute())) for path in paths if path and os.path.isfile(path)]
    return max(found, key=lambda c: c.step, default=None)


def _read(path: str) -> Checkpoint:
    plain = True
    try:
        try:
            read = load_saved(path)
        except UntrustedObjects:
            read, plain = load_without_objects(path), False
        return Checkpoint(path, int(read.get("global_step", -1)), plain)
    except Exception:  # whatever it is, the message must not fail on it
        return Checkpoint(path, -1, plain)


def _by_command(
    exporters: Sequence[str | Exporter], targets: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Targets that ``lightning-qat export --to`` makes as the run would, and the others."""
    known: list[str] = []
    own: list[str] = []
    for exporter in exporters:
        name = exporter if isinstance(exporter, str) else exporter.name
        if name not in targets:
            continue
        same = isinstance(exporter, str)
        if not same:
            try:
                default: Any = load_exporter(name)
                same = type(default) is type(exporter) and vars(default) == vars(exporter)
            except (ValueError, TypeError, ImportError):
                same = False
        (known if same else own).append(name)
    return known, own


def _from_checkpoint(
    checkpoint: Checkpoint,
    pl_module: LightningModule,
    inputs: Any,
    targets: Sequence[str],
    prefix: Path,
    trainer: Trainer,
) -> str:
    module, root = _dotted(type(pl_module))
    options = []
    config = _cli_config(trainer)
    if config is not None:
        options += ["--config", str(config)]
    else:
        options += _init_args(pl_module)
    if getattr(pl_module, "example_input_array", None) is None:
        options += ["--example-inputs", _shape(inputs)]
    if not checkpoint.plain:
        options.append("--trust")
    start = ["lightning-qat", "export", checkpoint.path, "--module", module]
    command = _joined(start, targets, prefix.parent, options)
    elsewhere = root is not None and root != Path.cwd()
    return f"cd {shlex.quote(str(root))} && {command}" if elsewhere else command


def _joined(
    start: Sequence[str], targets: Sequence[str], folder: Path, options: Sequence[str]
) -> str:
    return shlex.join([*start, "--to", ",".join(targets), "--out", str(folder), *options])


def _dotted(cls: type[Any]) -> tuple[str, Path | None]:
    """How a class is imported, and in which folder; without one: anywhere, or nowhere."""
    module = sys.modules.get(cls.__module__)
    file, spec = getattr(module, "__file__", None), getattr(module, "__spec__", None)
    name = cls.__module__
    if name == "__main__":
        name = spec.name if spec is not None else Path(file).stem if file else "__main__"
    if "." in cls.__qualname__ or name == "__main__":
        # Made in a function, in another class or in a notebook: nothing else can import it.
        return f"PACKAGE.FILE.{cls.__name__}", None
    root = None
    if file is not None:
        depth = name.count(".") + (Path(file).name == "__init__.py")
        root = Path(file).resolve().parents[depth]
        if {"site-packages", "dist-packages"} & set(root.parts):
            root = None
    return f"{name}.{cls.__qualname__}", root


def _cli_config(trainer: Trainer) -> Path | None:
    """The configuration that LightningCLI has written beside the logs."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = getattr(callback, "config_filename", None)
        if isinstance(name, str) and trainer.log_dir is not None:
            path = Path(trainer.log_dir, name).absolute()
            return path if path.is_file() else None
    return None


def _init_args(pl_module: LightningModule) -> list[str]:
    """``--init-args`` for what the constructor needs and the checkpoint does not hold."""
    needed = [
        name
        for name, parameter in inspect.signature(type(pl_module)).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in pl_module.hparams
    ]
    if not needed:
        return []
    return ["--init-args", "{" + ", ".join(f'"{name}": VALUE' for name in needed) + "}"]


def _shape(inputs: Any) -> str:
    """The shape of one float tensor, as ``--example-inputs`` takes it; else a file must be made."""
    while isinstance(inputs, tuple) and len(inputs) == 1:
        (inputs,) = inputs
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim:
        return ",".join(map(str, inputs.shape))
    return "FILE.npz"
