"""``lightning-qat inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lightning_qat.cli.command import FILE, FINE, command, json_option, print_json, trust_option
from lightning_qat.cli.console import print_table
from lightning_qat.cli.own_formats import inspect_own

if TYPE_CHECKING:
    from lightning_qat.export.files.inspection import InspectedTensor, Inspection

_MOST = 20
"""So many names are printed of what stays float; JSON has all."""


@command("inspect")
@click.argument("file", type=FILE)
@trust_option
@json_option
def inspect(file: Path, trust: bool, as_json: bool) -> int:
    """Show what a file quantizes and what it leaves float.

    FILE is a deploy, fake-quant or QDQ model (ONNX) or a TFLite file, of this or another tool; a
    converted model (.pt2); the checkpoint of a QAT run; or AMCT's record. Shown are its size with
    external data, the share of layers and of their multiplications that are computed on integers,
    what stays float, how often each operator comes, and every quantized tensor.

      lightning-qat inspect results/net_qdq.onnx
      lightning-qat inspect runs/last.ckpt --json
    """
    from lightning_qat.export.files.inspection import inspect_file

    if not file.is_file():
        raise FileNotFoundError(f"There must be a file to inspect at {str(file)!r}; none is there.")
    found = inspect_own(file, trust=trust) or inspect_file(file)
    if found is None:
        raise ValueError(
            f"{str(file)!r} must be an ONNX or TFLite file, a converted model (.pt2), a checkpoint "
            "(.ckpt) or AMCT's record (.txt, .pb); no exporter knows it."
        )
    if as_json:
        print_json(found.to_dict())
        return FINE
    print("\n".join(_summary(found)))
    if found.tensors:
        print()
        columns = ("tensor", "kind", "type", "scale", "zero point")
        print_table(columns, [*map(_row, found.tensors)])
    return FINE


def _summary(found: Inspection) -> Iterator[str]:
    yield found.format
    yield from (f"  {path}: {size:,} bytes" for path, size in found.files.items())
    yield from (f"  {heading}: {text}" for heading, text in found.facts.items())
    kinds = [tensor.kind for tensor in found.tensors]
    yield f"  {kinds.count('weight')} quantized weights, {kinds.count('activation')} activations"
    if found.layers is not None:
        integers = sum(layer.integer for layer in found.layers)
        share = found.integer_macs
        macs = "" if share is None else f", {share:.1%} of their multiplications"
        yield f"  {integers} of {len(found.layers)} layers on integers{macs}"
        real = [f"{ly.name} ({ly.operator})" for ly in found.layers if not ly.integer]
        yield from _named("layers in float", real)
        yield from _named("other operators in float", found.left_float)
    if found.operators:
        counts = ", ".join(f"{name} {count}" for name, count in found.operators.items())
        yield f"  operators: {counts}"


def _named(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        yield f"  {what}: {', '.join(names[:_MOST])}{more}"


def _row(tensor: InspectedTensor) -> tuple[str, str, str, str, str]:
    scale = "found at conversion" if tensor.kind == "weight" else "no range yet"
    if tensor.scale:
        low, high = min(tensor.scale), max(tensor.scale)
        scale = f"{low:.6g}"
        if len(tensor.scale) > 1:
            scale += f" .. {high:.6g} ({len(tensor.scale)} channels)"
    points = dict.fromkeys(tensor.zero_point)
    return tensor.name, tensor.kind, tensor.type, scale, ", ".join(map(str, [*points][:3]))
