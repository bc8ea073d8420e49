"""Notes on a ``.tflite`` file: what is computed in float and why, and what rounds differently."""

from __future__ import annotations

from collections import Counter

from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.tflite.flatbuffer.file import FileOperator, TFLiteFile
from lightning_qat_exporters.tflite.flatbuffer.kernel_limits import (
    BITS,
    LIMITED,
    broken_limit,
    constant_scale,
    place_of,
)
from lightning_qat_exporters.tflite.flatbuffer.match_layers import MatchedLayers


def notes_on(model: QuantizedModel, file: TFLiteFile, layers: MatchedLayers) -> tuple[str, ...]:
    """Write one sentence per layer in float, and one each on other facts of a file.

    The other facts are operators in float, double rounding, weights of fewer than 8 bits, and
    weights of -128.
    """
    notes, explained = [], set()
    in_float = dict.fromkeys(file.float_operators)
    planned = joins_are_planned(model)
    for layer, stored in layers:
        if stored is None or stored.operator not in in_float:
            continue
        explained.add(stored.operator)
        why = "its output is not quantized" if stored.source else "its input is not quantized"
        remedy = "" if planned else "A recipe with joins=True and outputs=True quantizes it."
        if "3D" in stored.operator.kind:
            why, remedy = f"LiteRT has {stored.operator.kind} in float only", ""
        says = f"{layer.name}: computed in float on its integer weight, because {why}. {remedy}"
        notes.append(says.rstrip())
    for op, limit in _limits_kept_in_float(file).items():
        explained.add(op)
        notes.append(
            f"{place_of(file, op)}: computed in float on integers, because LiteRT's integer "
            f"kernel would end the process: {limit}."
        )
    others = Counter(op.kind for op in in_float if op not in explained)
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        notes.append(f"Computed in float, because what they read or write is not: {kinds}.")
    twice = Counter(op.kind for op in file.operators if _is_rounded_twice(file, op))
    if twice:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(twice.items()))
        notes.append(
            "Rounded on the grid of the input and then on that of the output, so up to two steps "
            f"from training instead of one: {kinds}."
        )
    narrow = [
        key
        for key, t in model.tensors.items()
        if t.integers is not None and t.qparams.grid.qmax < 127
    ]
    if narrow:
        names = ", ".join(narrow)
        notes.append(f"Weights of fewer than 8 bits are stored as int8, the same values: {names}.")
    lowest = [
        key
        for key, t in model.tensors.items()
        if t.integers is not None and t.integers.numel() and int(t.integers.min()) == -128
    ]
    if lowest:
        notes.append(
            "Weights hold -128, which LiteRT's specification excludes: ARM kernels without dot "
            "products add two products in 16 bits and overflow where both inputs are -128 too. On "
            f"x86 all kernels compute them. WeightSpec's own grid avoids it: {', '.join(lowest)}."
        )
    return tuple(notes)


def _limits_kept_in_float(file: TFLiteFile) -> dict[FileOperator, str]:
    """The operators between integers that are float for a limit of LiteRT's kernels, and which."""
    makers = {output: op for op in file.operators for output in op.outputs}
    written = {
        op.inputs[0]: file.tensors[op.outputs[0]] for op in file.operators if op.kind == "QUANTIZE"
    }

    def scale_of(index: int) -> float | None:
        """The scale of integers or of a constant that a float operator reads; ``None``: float."""
        maker, tensor = makers.get(index), file.tensors[index]
        if maker is not None and maker.kind == "DEQUANTIZE":
            return float(file.tensors[maker.inputs[0]].scale[0])
        return None if tensor.data is None else constant_scale(float(abs(tensor.data).max()))

    found = {}
    for operator in file.float_operators:
        output = written.get(operator.outputs[0])
        if operator.kind not in LIMITED or output is None:
            continue
        scales = [scale_of(index) for index in operator.inputs]
        known = [scale for scale in scales if scale is not None]
        step, bits = float(output.scale[0]), BITS.get(output.type)
        if bits is None or len(known) < len(scales):
            continue
        limit = broken_limit(operator.kind, known, step, bits)
        if limit is not None:
            found[operator] = limit
    return found


def joins_are_planned(model: QuantizedModel) -> bool:
    """Whether the recipe has all joins and outputs; without a recipe, whether any is quantized."""
    if model.recipe:
        return model.recipe.get("joins") is True and bool(model.recipe.get("outputs"))
    read = {layer.input_key for layer in model.layers}
    return any(t.kind == "activation" and key not in read for key, t in model.tensors.items())


def _is_rounded_twice(file: TFLiteFile, operator: FileOperator) -> bool:
    """Whether an operator averages with its input's scale and is requantized."""
    written = operator.outputs[0]
    readers = [op for op in file.operators if written in op.inputs]
    return (
        operator.kind in ("AVERAGE_POOL_2D", "RESIZE_BILINEAR")
        and file.tensors[written].quantized
        and any(op.kind == "QUANTIZE" for op in readers)
    )
