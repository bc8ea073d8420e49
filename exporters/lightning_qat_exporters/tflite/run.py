"""Run a ``.tflite`` file with LiteRT's interpreter, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.quiet import quietly
from lightning_qat_exporters.tflite.flatbuffer.file import DTYPES, FileTensor, TFLiteFile, read

RUNTIMES: Mapping[str, str] = {
    # The most literal first: XNNPACK rounds once per operator, as torch does. LiteRT's own kernels
    # round twice, and their optimized mean is a step low on every fifth element.
    "LiteRT, XNNPACK": "AUTO",
    "LiteRT, reference kernels": "BUILTIN_REF",
    "LiteRT, builtin kernels": "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
}
"""Name to the kernels of an interpreter, as ``OpResolverType`` calls them."""


def interpreter(content: bytes, kernels: str, **options: Any) -> Any:
    """An interpreter with its tensors allocated, on one thread.

    Raises:
        RuntimeError: LiteRT cannot prepare the file with these kernels.
    """
    with quietly():
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        kind = getattr(OpResolverType, kernels)
        made = Interpreter(
            model_content=content, num_threads=1, experimental_op_resolver_type=kind, **options
        )
        made.allocate_tensors()
    return made


def check_runs(content: bytes) -> str | None:
    """Prepare a file with LiteRT, with and without XNNPACK; return its error or ``None``."""
    for kernels in ("BUILTIN_WITHOUT_DEFAULT_DELEGATES", "AUTO"):
        try:
            interpreter(content, kernels)
        except (RuntimeError, ValueError) as error:
            return str(error).strip()
    return None


def run(content: bytes, kernels: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a file on a batch of any size, sample by sample as a device does.

    Args:
        content: The file.
        kernels: One of the values of ``RUNTIMES``.
        inputs: Real values by input name, in torch's layout. They are brought to the file's
            layout and quantized where the file takes integers.

    Returns:
        Real values by output name, in torch's layout.

    Raises:
        ValueError: An input does not have the file's shape, apart from the batch.
    """
    file = read(content)
    samples = split_samples(file, inputs)
    runner = interpreter(content, kernels).get_signature_runner()
    parts: list[dict[str, Array]] = [runner(**sample) for sample in samples]
    return joined_outputs(file, parts)


def split_samples(file: TFLiteFile, inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
    """The inputs of each run of a file: its layout, its types, as many samples as it takes.

    Raises:
        ValueError: As ``run``.
    """
    channels_last = file.facts.get("layout") == "nhwc"
    given = {
        name: _to_file(inputs[name], file.tensors[index], channels_last)
        for name, index in file.inputs.items()
    }
    batches = _batches(file, given)
    once = {name for name, i in file.inputs.items() if given[name].shape == file.tensors[i].shape}
    samples = {
        name: [value] * batches if name in once else np.split(value, batches)
        for name, value in given.items()
    }
    return [{name: values[number] for name, values in samples.items()} for number in range(batches)]


def joined_outputs(file: TFLiteFile, parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Real values by output name, in torch's layout, from those of each run."""
    channels_last = file.facts.get("layout") == "nhwc"
    axes = file.facts.get("batch_axes", {})
    return {
        name: np.concatenate(
            [_from_file(part[name], file.tensors[index], channels_last) for part in parts],
            axes.get(name, 0),
        )
        if len(parts) > 1
        else _from_file(parts[0][name], file.tensors[index], channels_last)
        for name, index in file.outputs.items()
    }


def _batches(file: TFLiteFile, given: Mapping[str, Array]) -> int:
    """How many times the file must run for a batch."""
    counts = set()
    for name, index in file.inputs.items():
        shape, wanted = given[name].shape, file.tensors[index].shape
        if shape == wanted:
            continue
        if shape[1:] != wanted[1:] or shape[0] % wanted[0]:
            raise ValueError(
                f"Input {name!r} of the file has shape {wanted}; got {shape}. Only the first "
                "dimension may differ, by a multiple."
            )
        counts.add(shape[0] // wanted[0])
    if len(counts) > 1:
        raise ValueError(f"Inputs must have one batch size; got {sorted(counts)} times the file's.")
    return counts.pop() if counts else 1


def _to_file(value: Array, tensor: FileTensor, channels_last: bool) -> Array:
    if channels_last and value.ndim == 4:
        value = value.transpose(0, 2, 3, 1)
    dtype = DTYPES[tensor.type]
    if tensor.quantized:
        value = quantized(value, tensor)
    return np.ascontiguousarray(value, dtype)


def quantized(value: Array, tensor: FileTensor) -> Array:
    """The integers of real values on a tensor's grid."""
    dtype = DTYPES[tensor.type]
    limits = np.iinfo(dtype)
    steps = np.rint(value / tensor.scale[0]) + tensor.zero_point[0]
    integers: Array = np.clip(steps, limits.min, limits.max).astype(dtype)
    return integers


def dequantized(value: Array, tensor: FileTensor) -> Array:
    """The real values, float32, of integers on a tensor's grid."""
    real: Array = (value.astype(np.float32) - np.float32(tensor.zero_point[0])) * tensor.scale[0]
    return real


def _from_file(value: Array, tensor: FileTensor, channels_last: bool) -> Array:
    if tensor.quantized:
        value = dequantized(value, tensor)
    return value.transpose(0, 3, 1, 2) if channels_last and value.ndim == 4 else value
