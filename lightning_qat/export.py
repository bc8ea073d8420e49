"""The exporter protocol, the way to an exporter by name, and ``export``. Knows no file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lightning_qat.quantized_model import QuantizedModel
from lightning_qat.recipe import closest

ENTRY_POINT_GROUP = "lightning_qat.exporters"

Array = NDArray[Any]


@dataclass(frozen=True)
class Artifact:
    """The files of one target.

    Args:
        target: Name of the exporter that wrote them.
        files: What each file is (``model``, ``record``, ...) and where.
        notes: What a reader of the files should know, one sentence each.
    """

    target: str
    files: Mapping[str, Path]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unsupported:
    """One thing that a target cannot express."""

    layer: str
    reason: str
    remedy: str


class UnsupportedByTarget(ValueError):
    """A target cannot express parts of a model; all of them are named.

    Args:
        target: Name of the exporter.
        problems: What it cannot express.
    """

    def __init__(self, target: str, problems: tuple[Unsupported, ...]) -> None:
        self.target, self.problems = target, problems
        lines = "".join(f"\n  {p.layer}: {p.reason}. {p.remedy}" for p in problems)
        super().__init__(f"The target {target!r} cannot express:{lines}")


class MissingDependency(ImportError):
    """An exporter needs a package that is not installed."""


@runtime_checkable
class Exporter(Protocol):
    """What an exporter is; no base class is needed.

    Options are constructor arguments, and a constructor does no work and imports nothing heavy.
    """

    @property
    def name(self) -> str:
        """The target's name, that of its entry point."""
        ...

    def check_available(self) -> None:
        """Raise ``MissingDependency`` when a package is missing; called before training."""

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        """Write the files, atomically.

        Args:
            model: The neutral description; the only thing an exporter may read.
            path_prefix: Folder and beginning of every file's name.

        Raises:
            UnsupportedByTarget: With everything the target cannot express.
        """
        ...


@runtime_checkable
class Readable(Protocol):
    """An exporter that reads its files' numbers back."""

    def differences(self, model: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
        """Every scale, zero point and integer in the files that is not the model's, in words."""
        ...


@runtime_checkable
class Runnable(Protocol):
    """An exporter whose files run here."""

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Names of the runtimes, the most literal first."""
        ...

    def run(
        self, artifact: Artifact, runtime: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run the files on a batch: outputs by name."""
        ...


@runtime_checkable
class Explaining(Protocol):
    """A runnable exporter that knows why a runtime may differ."""

    def explain(self, max_steps: Mapping[str, float]) -> tuple[str, ...]:
        """What is behind the differences, given the largest one of each runtime in steps."""
        ...


def load_exporter(exporter: str | Exporter | type[Exporter]) -> Exporter:
    """An exporter from its name, itself or its class.

    Names are those of the entry points in the group ``lightning_qat.exporters``; nothing is
    imported but the one that is asked for.

    Raises:
        ValueError: No exporter of that name is installed; the message lists those that are.
        MissingDependency: Its module needs a package that is not installed.
        TypeError: It is no exporter.
    """
    if isinstance(exporter, str):
        found = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
        if exporter not in found:
            raise ValueError(
                f"No exporter named {exporter!r}; {closest(exporter, found)}. "
                f"Installed exporters: {sorted(found)}."
            )
        try:
            exporter = found[exporter].load()
        except ImportError as error:
            raise MissingDependency(
                f"The exporter {found[exporter].name!r} needs a package that is not installed: "  # type: ignore[index]
                f"{error}. Install it, or leave the exporter out."
            ) from error
    if isinstance(exporter, type):
        exporter = exporter()
    if not isinstance(exporter, Exporter):
        raise TypeError(
            "An exporter must have name, check_available() and export(); got "
            f"{type(exporter).__name__}."
        )
    return exporter


def export(
    model: QuantizedModel,
    exporter: str | Exporter | type[Exporter],
    path_prefix: str | Path,
) -> Artifact:
    """Write a converted model for one target.

    Args:
        model: What ``convert`` returned.
        exporter: A name such as ``"fake_quant_onnx"`` or ``"cann"``, an exporter or its class.
        path_prefix: Folder and beginning of every file's name: ``out/net`` gives ``out/net_...``.

    Returns:
        The files.

    Raises:
        TypeError: ``model`` is not a converted model.
        ValueError: No such exporter.
        MissingDependency: The exporter needs a package that is not installed.
        UnsupportedByTarget: With everything the target cannot express; nothing was written.
    """
    if not isinstance(model, QuantizedModel):
        raise TypeError(
            f"export takes a QuantizedModel; got {type(model).__name__}. Call "
            "convert(model, example_inputs) first."
        )
    loaded = load_exporter(exporter)
    loaded.check_available()
    return loaded.export(model, Path(path_prefix))


def as_arrays(tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Torch tensors by name as NumPy arrays by name."""
    return {name: np.asarray(tensor.detach().cpu()) for name, tensor in tensors.items()}
