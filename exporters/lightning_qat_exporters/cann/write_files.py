"""Write the files of a matched QDQ model: deploy model, fake-quant model and record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from lightning_qat.amct.record import BINARY_SUFFIX, encode_record, format_record
from lightning_qat.atomic_write import replacing
from lightning_qat_exporters.cann.deploy import to_deploy
from lightning_qat_exporters.cann.downgrade_opset import opset_note
from lightning_qat_exporters.cann.fake_quant import to_fake_quant
from lightning_qat_exporters.cann.layer_records import layer_records
from lightning_qat_exporters.cann.qdq_graph.types import QuantizedGraph
from lightning_qat_exporters.cann.rewrite import NEEDED_BY
from lightning_qat_exporters.onnx_files.write import write_onnx


def file_paths(prefix: Path, record: Path | None) -> dict[str, Path]:
    """Where the files go, by role: ``model``, ``fake_quant`` and, if asked for, ``record``."""
    files = {
        "model": prefix.with_name(f"{prefix.name}_deploy_model.onnx"),
        "fake_quant": prefix.with_name(f"{prefix.name}_fake_quant_model.onnx"),
    }
    return files if record is None else {**files, "record": record}


class WrittenFiles(NamedTuple):
    """Files by role, and what a reader of the deploy model should know."""

    files: dict[str, Path]
    notes: tuple[str, ...]


def write_files(
    deploy: QuantizedGraph,
    simulated: QuantizedGraph,
    files: Mapping[str, Path],
    opset: int | None,
    *,
    float_bias: bool = False,
    product: str | None = None,
) -> WrittenFiles:
    """Write all files or none.

    Args:
        deploy: The QDQ model of the deploy model and the record.
        simulated: The QDQ model of the fake-quant model.
        files: The files by role, as ``file_paths`` returns them.
        opset: Version of the default domain, 11 to 18; ``None``: for each model the lowest that
            expresses it.
        float_bias: Keep biases in float and add them after the layers.
        product: The product that the deploy model is for.

    Returns:
        ``files``, with the weights of a model where they are in a file of their own, and what to
        say of them.

    Raises:
        UnsupportedByTarget: A pair, bias or operator cannot be expressed; all are named.
        OSError: A file cannot be written.
    """
    forms: dict[str, tuple[Callable[..., ir.Model], QuantizedGraph]] = {
        "model": (partial(to_deploy, product=product), deploy),
        "fake_quant": (to_fake_quant, simulated),
    }
    written, notes = dict(files), []
    with ExitStack() as stack:
        # One after the other: only one of the models is in memory, and no file takes its place
        # before all are written.
        for role, (form, found) in forms.items():
            temporary = stack.enter_context(replacing(files[role]))
            model = form(found, opset, float_bias=float_bias)
            _, *weights = write_onnx(model, temporary, files[role])
            written.update({f"{role}_weights": path for path in weights})
            if role == "model" and model.meta[NEEDED_BY]:
                notes.append(opset_note(model.graph.opset_imports[""], model.meta[NEEDED_BY]))
            del model
        if "record" in files:
            temporary = stack.enter_context(replacing(files["record"]))
            temporary.write_bytes(_record(deploy, binary=files["record"].suffix == BINARY_SUFFIX))
    return WrittenFiles(written, tuple(notes))


def _record(found: QuantizedGraph, *, binary: bool) -> bytes:
    records = layer_records(found)
    return encode_record(records) if binary else format_record(records).encode()
