"""The protocols of an exporter, what it returns and what it raises."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lightning_qat.ir.quantized_model import QuantizedModel

Array = NDArray[Any]
"""A NumPy array of any dtype; exporters import it from here."""


@dataclass(frozen=True)
class Artifact:
    """The files of one target.

    Args:
        target: Name of the exporter that wrote them.
        files: What each file is (``model``, ``record``, ...) and where.
        notes: What a reader of the files should know, one sentence each.
        integers: Keys of the model's tensors that the files compute with as integers: the weight of
            a layer that runs on integers, and each activation that another operator than a layer
            reads as integers. ``None``: the exporter does not say.
        differences: What is planned on integers and not in the files, one sentence each; ``export``
            fills it in.
    """

    target: str
    files: Mapping[str, Path]
    notes: tuple[str, ...] = ()
    integers: frozenset[str] | None = None
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unsupported:
    """One part of a model that a target cannot express, or leaves in float.

    Args:
        layer: Name of the layer, node, tensor or input.
        reason: What must hold and what the model has; without a full stop.
        remedy: What to do about it, without a full stop; empty where nothing needs to be done.
    """

    layer: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        """One line."""
        return f"{self.layer!r}: {self.reason}." + (f" {self.remedy}." if self.remedy else "")


class CannotExpress(Exception):
    """Raised inside an exporter for one part of a model, by code that does not know its layer.

    The caller knows the layer: it catches the exception, collects ``error.at(layer)`` and goes on,
    so that ``UnsupportedByTarget`` names everything at once.

    Args:
        reason: As for ``Unsupported``.
        remedy: As for ``Unsupported``.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy

    def at(self, layer: str) -> Unsupported:
        """The same, with the layer's name."""
        return Unsupported(layer, self.reason, self.remedy)


class UnsupportedByTarget(ValueError):
    """A target cannot express parts of a model; all of them are named.

    Args:
        target: Name of the exporter.
        problems: Every part that it cannot express.
    """

    def __init__(self, target: str, problems: Iterable[Unsupported]) -> None:
        self.target, self.problems = target, tuple(problems)
        lines = "".join(f"\n  {p.layer}: {p.reason}. {p.remedy}".rstrip() for p in self.problems)
        super().__init__(f"The target {target!r} cannot express:{lines}")


class CannotRun(RuntimeError):
    """A runtime cannot run a file; ``verify`` says so and goes on with the others.

    Args:
        runtime: Name of the runtime.
        reason: What the runtime said, cut to one short line.
    """

    def __init__(self, runtime: str, reason: str) -> None:
        self.runtime, self.reason = (
            runtime,
            textwrap.shorten(reason.strip(" \n."), 300, placeholder=" ..."),
        )
        super().__init__(f"{runtime} cannot run the file: {self.reason}")


class MissingDependency(ImportError):
    """An exporter needs a package that is not installed."""


@runtime_checkable
class Exporter(Protocol):
    """The three members of every exporter; no base class is needed.

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
            model: The converted model; the only thing an exporter may read.
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
        """Run the files on a batch: outputs by name.

        Raises:
            CannotRun: The runtime refuses the files; ``verify`` goes on with the others.
        """
        ...


@runtime_checkable
class Explaining(Protocol):
    """A runnable exporter that knows why a runtime may differ."""

    def explain(self, max_steps: Mapping[str, float]) -> tuple[str, ...]:
        """What is behind the differences, given the largest one of each runtime in steps."""
        ...


@runtime_checkable
class Cautioning(Protocol):
    """An exporter that knows what is better decided before the training than after it."""

    def cautions(self, model: QuantizedModel) -> tuple[str, ...]:
        """Short sentences about the files of a model, with what to do; said once, at the start.

        Args:
            model: The untrained model; its ranges are made up.
        """
        ...


def as_arrays(tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Torch tensors by name as NumPy arrays by name."""
    return {name: np.asarray(tensor.detach().cpu()) for name, tensor in tensors.items()}
