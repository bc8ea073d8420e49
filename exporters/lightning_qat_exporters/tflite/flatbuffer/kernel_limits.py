"""Scales with which LiteRT's integer kernels end the process instead of reporting an error.

===========  =====================================================================================
ADD          ``2 * max(s_1, s_2) < 2**20 * s_output``, with 2**15 for 16 bits: both inputs are
             shifted left by so many bits before they are added; SUB has no such limit
SOFTMAX      ``s_input * 2**26 > 1`` at 8 bits: differences are counted in 1 / 2**26
===========  =====================================================================================

The kernels check their fixed-point multipliers with ``TFLITE_CHECK``, which calls ``abort``.
Source: ``kernels/internal/quantization_util.cc`` (``QuantizeMultiplierSmallerThanOneExp``,
``PreprocessSoftmaxScaling``), and ``Prepare`` in ``kernels/add.cc``; ``kernels/sub.cc`` asks first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from lightning_qat.export.protocol import Unsupported
from lightning_qat_exporters.tflite.flatbuffer.file import FileOperator, TFLiteFile

LIMITED = ("ADD", "SOFTMAX")

BITS: Mapping[str, int] = {"INT8": 8, "UINT8": 8, "INT16": 16}
"""Bits of the types that these kernels compute."""

_SOFTMAX_SMALLEST = 2.0**-26
_SUM_SHIFT = {8: 20, 16: 15}


def broken_limit(kind: str, inputs: Sequence[float], output: float, bits: int) -> str | None:
    """Say which limit an integer operator breaks; ``None``: it runs.

    Args:
        kind: LiteRT's name of the operator.
        inputs: The scales of its inputs.
        output: The scale of its output.
        bits: 8 or 16.

    >>> broken_limit("SOFTMAX", [1e-9], 1 / 256, 8)
    'the scale of its input is 1e-09, and the kernel needs more than 2**-26 = 1.49e-08'
    >>> broken_limit("ADD", [0.5, 0.5], 2.0**-19, 8) is None
    True
    >>> broken_limit("ADD", [0.5, 0.5], 2.0**-20, 8)
    'the scale of its output is 9.54e-07, and the kernel needs more than 9.54e-07, the largest \
scale of its inputs (0.5) / 2**19'
    """
    if kind == "SOFTMAX" and bits == 8 and inputs[0] <= _SOFTMAX_SMALLEST:
        return (
            f"the scale of its input is {inputs[0]:.3g}, and the kernel needs more than "
            f"2**-26 = {_SOFTMAX_SMALLEST:.3g}"
        )
    if kind == "ADD":
        shift = _SUM_SHIFT[bits] - 1
        smallest = max(inputs) / 2**shift
        if output <= smallest:
            return (
                f"the scale of its output is {output:.3g}, and the kernel needs more than "
                f"{smallest:.3g}, the largest scale of its inputs ({max(inputs):.3g}) / 2**{shift}"
            )
    return None


def constant_scale(largest: float) -> float:
    """The scale that the converter gives a constant, at most: its range over 255 steps, 1 to zeros.

    Half the range may be unused.

    Args:
        largest: Its largest absolute value.
    """
    return largest / 127 or 1.0


def limit_of(file: TFLiteFile, operator: FileOperator) -> str | None:
    """Say which limit an integer operator of a file breaks; ``None``: it runs."""
    *inputs, output = (file.tensors[i] for i in (*operator.inputs, operator.outputs[0]))
    if operator.kind not in LIMITED or not all(t.quantized for t in (*inputs, output)):
        return None
    bits = BITS.get(output.type)
    if bits is None:
        return None
    scales = [float(tensor.scale[0]) for tensor in inputs]
    return broken_limit(operator.kind, scales, float(output.scale[0]), bits)


def operators_that_abort(file: TFLiteFile) -> Iterator[Unsupported]:
    """List every integer operator of a file that would end the process of its runtime."""
    for operator in file.operators:
        reason = limit_of(file, operator)
        if reason is not None:
            yield Unsupported(
                place_of(file, operator),
                f"LiteRT ends the process that prepares this {operator.kind}: {reason}",
                "Leave its inputs or its output unquantized (exclude), or look why values differ "
                "that much in size: an untrained or a dead part of the network often does",
            )


def places_of_failure(file: TFLiteFile, failure: str) -> tuple[str, ...]:
    """The operators that LiteRT names when it cannot prepare a file, by ``place_of``.

    It names one by its number, or a kind of which it has no kernel.
    """
    number = re.search(r"Node number (\d+) \(", failure)
    kind = re.search(r"opcode '(\w+)'", failure)
    found: Sequence[FileOperator] = ()
    if number is not None:
        found = file.operators[int(number[1]) :][:1]
    elif kind is not None:
        found = [op for op in file.operators if op.kind == kind[1]]
    return tuple(dict.fromkeys(place_of(file, op) for op in found))


def place_of(file: TFLiteFile, operator: FileOperator) -> str:
    """An operator by the nearest tensor before it that has a module's name, and its kind."""
    makers = {output: op for op in file.operators for output in op.outputs}
    waiting, seen = list(operator.outputs), set[int]()
    while waiting:
        index = waiting.pop(0)
        name = file.tensors[index].name
        if name and not name.startswith(("lightning_qat_exporters", "serving_default")):
            return name if index in operator.outputs else f"{operator.kind} behind {name!r}"
        maker = makers.get(index)
        new = [] if maker is None else [i for i in maker.inputs if i >= 0 and i not in seen]
        seen.update(new)
        waiting += new
    return file.tensors[operator.outputs[0]].name
