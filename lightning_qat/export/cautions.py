"""What makes an agreement say less than it seems to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from lightning_qat.export.protocol import Array

FEW = 4
"""Fewer samples than this say little."""

_MORE = "Verify with real data: verify(model, artifact, inputs), QATCallback(example_inputs=...)"


def cautions(
    inputs: Mapping[str, Array], outputs: Mapping[str, Array], samples: int
) -> tuple[str, ...]:
    """Warn of few samples, of samples that are all equal, and of outputs that never change.

    Args:
        inputs: By name, as the runtimes got them.
        outputs: By name, as the converted model computes them.
        samples: How many samples the inputs hold.
    """
    return tuple(_cautions(inputs, outputs, samples))


def _cautions(
    inputs: Mapping[str, Array], outputs: Mapping[str, Array], samples: int
) -> Iterator[str]:
    batches = [array for array in inputs.values() if array.ndim and len(array) == samples]
    if samples > 1 and batches and all(map(_is_repeated, batches)):
        yield f"All {samples} samples are equal, so they count as one. {_MORE}."
        return
    if samples < FEW:
        yield f"Samples compared: {samples}, too few to say much. {_MORE}."
    for name, output in outputs.items():
        if not output.ndim or len(output) != samples or samples == 1 or not _is_repeated(output):
            continue
        yield (
            f"Output {name!r} is the same for all {samples} samples, so that it is the same in the "
            "file proves little: the network has collapsed (NaN, a learning rate too high), or "
            "was hardly trained."
        )


def _is_repeated(array: Array) -> bool:
    """Whether every sample is the first one; one value for all counts as well."""
    return bool(np.array_equal(array, np.broadcast_to(array[:1], array.shape), equal_nan=False))
