"""What an exporter shows of the tensors inside its files, so that they can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from lightning_qat.export.protocol import Array, Artifact


@dataclass(frozen=True, eq=False)
class TracedTensor:
    """One quantized activation inside a file, after a run.

    Args:
        name: The tensor's name in the file.
        scale: Its scale in the file.
        zero_point: Its zero point in the file, for signed integers.
        values: Its real values. The first axis counts samples where the file runs sample by sample.
        keys: The keys of the model's tensors that it stands for, where the file holds them.
    """

    name: str
    scale: float
    zero_point: int
    values: Array
    keys: tuple[str, ...] = ()


class Trace(NamedTuple):
    """One run of a file.

    Args:
        tensors: Its quantized activations, in the order of execution.
        outputs: Its outputs by name, as ``Runnable.run`` returns them.
    """

    tensors: tuple[TracedTensor, ...]
    outputs: Mapping[str, Array]


@runtime_checkable
class Traceable(Protocol):
    """A runnable exporter that shows the quantized activations inside its files."""

    @property
    def traced_runtime(self) -> str:
        """The runtime that ``trace`` uses: the most literal one."""
        ...

    def trace(
        self,
        artifact: Artifact,
        inputs: Mapping[str, Array],
        given: Mapping[str, Array] | None = None,
    ) -> Trace:
        """Run the files on a batch.

        Args:
            artifact: The files.
            inputs: As for ``run``.
            given: Values that readers of a tensor get in the place of what the file computes, by
                the tensor's name and in the shape that an earlier trace has shown. The file's own
                values are still what is returned, so each of them shows the error of the few
                operators behind the tensors that were given.

        Raises:
            CannotRun: The files cannot be run so.
        """
        ...
