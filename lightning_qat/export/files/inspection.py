"""What a file quantizes and what it leaves float, in words and numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from lightning_qat.export.files.recognize import installed_exporters


@dataclass(frozen=True)
class InspectedTensor:
    """One quantized tensor.

    Args:
        name: Its key in the converted model where the file has it, else its name in the file.
        kind: What it is.
        type: Of its integers: ``int8``, ``uint8``, ``int4``.
        scale: One, or one per channel; empty where the file does not hold it.
        zero_point: As many.
        axis: The channels' axis; ``None``: there is one scale.
    """

    name: str
    kind: Literal["activation", "weight"]
    type: str
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None


@dataclass(frozen=True)
class InspectedLayer:
    """One product: a convolution or a multiplication of matrices.

    Args:
        name: Its name in the file.
        operator: The format's name of its operator.
        integer: Whether what it multiplies comes from integers.
        macs: Multiplications and additions for one sample; ``None``: a shape is unknown.
    """

    name: str
    operator: str
    integer: bool
    macs: int | None


@dataclass(frozen=True)
class Inspection:
    """What is in a file.

    Args:
        format: The kind of file, in words.
        files: Bytes of each of its files, external data among them.
        tensors: Quantized tensors, in the order of the file.
        layers: Products; ``None``: the file has no graph.
        operators: How often each operator is in it.
        left_float: Other operators that compute with real values which are not integers' values,
            by name.
        facts: What else the file says, by heading.
    """

    format: str
    files: Mapping[Path, int]
    tensors: tuple[InspectedTensor, ...]
    layers: tuple[InspectedLayer, ...] | None = None
    operators: Mapping[str, int] = field(default_factory=dict)
    left_float: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def integer_layers(self) -> float | None:
        """The share of layers that are computed on integers; ``None``: there is none."""
        if not self.layers:
            return None
        return sum(layer.integer for layer in self.layers) / len(self.layers)

    @property
    def integer_macs(self) -> float | None:
        """Their share of all multiplications; ``None``: some are unknown."""
        macs = [layer.macs for layer in self.layers or ()]
        known = [count for count in macs if count is not None]
        if len(known) < len(macs) or not sum(known):
            return None
        return sum(layer.macs or 0 for layer in self.layers or () if layer.integer) / sum(known)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Primitives."""
        return {
            **asdict(self),
            "files": {str(path): size for path, size in self.files.items()},
            "bytes": self.bytes,
            "integer_layers": self.integer_layers,
            "integer_macs": self.integer_macs,
        }


@runtime_checkable
class Inspecting(Protocol):
    """An exporter that reads files of its target's format, whoever wrote them."""

    def inspect(self, path: Path) -> Inspection | None:
        """What is in a file; ``None``: it has another format.

        Raises:
            ValueError: It has this format and cannot be read.
            MissingDependency: A package is missing that reads the format.
        """
        ...


def inspect_file(path: Path) -> Inspection | None:
    """What the first exporter says that knows the format; ``None``: no one does."""
    for exporter in installed_exporters():
        found = exporter.inspect(path) if isinstance(exporter, Inspecting) else None
        if found is not None:
            return found
    return None


def sizes(paths: Iterable[Path]) -> dict[Path, int]:
    """Bytes of files."""
    return {path: path.stat().st_size for path in paths}


def counted(operators: Iterable[str]) -> dict[str, int]:
    """How often each operator comes, the most frequent first.

    Example:
        >>> counted(["Relu", "Conv", "Conv"])
        {'Conv': 2, 'Relu': 1}
    """
    return dict(Counter(operators).most_common())
