"""What is in files of the core's own: checkpoints of QAT runs, converted models, AMCT's records."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_qat.cli.converted import converted_model, is_converted
from lightning_qat.cli.trained_module import of_command

if TYPE_CHECKING:
    from lightning_qat.export.files.inspection import InspectedTensor, Inspection


def inspect_own(path: Path, *, trust: bool = False) -> Inspection | None:
    """What is in a file; ``None``: it is an exporter's, or of an unknown format.

    Args:
        path: The file.
        trust: Load objects of a checkpoint, and a ``.pt2`` without a look at it.

    Raises:
        ValueError: It has one of these formats and cannot be read.
    """
    if is_converted(path):
        from lightning_qat.export.files.inspect_model import inspect_model

        return inspect_model(converted_model(path, trust=trust), path)
    if path.suffix in (".ckpt", ".pt", ".pth") or zipfile.is_zipfile(path):
        return _checkpoint(path, trust=trust)
    return _record(path) if path.suffix in (".txt", ".pb") else None


def _checkpoint(path: Path, *, trust: bool) -> Inspection:
    from lightning_qat.checkpoint.contents import CALLBACK_KEY
    from lightning_qat.checkpoint.load import read_checkpoint
    from lightning_qat.export.files.inspection import Inspection, sizes

    try:
        checkpoint = read_checkpoint(path, weights_only=not trust)
    except ValueError as error:
        raise of_command(error) from error
    state = checkpoint.get("callbacks", {}).get(CALLBACK_KEY, {})
    told = {
        "epoch": checkpoint.get("epoch"),
        "step": checkpoint.get("global_step"),
        "phase": state.get("phase"),
        "recipe": state.get("recipe"),
    }
    facts = {heading: str(value) for heading, value in told.items() if value is not None}
    tensors = tuple(_quantizers(checkpoint["state_dict"]))
    return Inspection("checkpoint of a QAT run", sizes([path]), tensors, facts=facts)


def _quantizers(state_dict: Mapping[str, Any]) -> Iterator[InspectedTensor]:
    """The tensors that a state_dict quantizes; scales of weights are found when it is converted."""
    from lightning_qat.export.files.inspection import InspectedTensor
    from lightning_qat.quantizers.factory import activation_quantizer
    from lightning_qat.quantizers.names import quantizer_of_key, quantizer_role, tensor_key
    from lightning_qat.quantizers.stored_values import from_tensor
    from lightning_qat.recipe.specs import ActivationSpec

    for key, stored in state_dict.items():
        path = quantizer_of_key(key)
        if path is None:
            continue
        values = from_tensor(stored, key)
        if quantizer_role(path.rpartition(".")[2]) == "weight":
            yield InspectedTensor(tensor_key(path), "weight", f"int{values['bits']}", (), ())
            continue
        quantizer = activation_quantizer(ActivationSpec(**values))
        prefix = f"{path}."
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        quantizer.load_state_dict(own)
        scale: tuple[float, ...] = ()
        zero_point: tuple[int, ...] = ()
        if quantizer.why_not_final is None:
            qparams = quantizer.qparams()
            scale, zero_point = (float(qparams.scale),), (int(qparams.zero_point),)
        kind = f"int{values['bits']}"
        yield InspectedTensor(tensor_key(path), "activation", kind, scale, zero_point)


def _record(path: Path) -> Inspection:
    from lightning_qat.amct.record import read_record
    from lightning_qat.export.files.inspection import InspectedTensor, Inspection, sizes

    tensors = []
    for record in read_record(path):
        sources = [("input", record.scale_d, record.offset_d)]
        if record.scale_h is not None:
            sources.append(("hidden", record.scale_h, record.offset_h or 0))
        weights = [("weight", record.scale_w), ("recurrent weight", record.scale_r)]
        for what, scale, offset in sources:
            name, kind = f"{record.name}.{what}", record.act_type.lower()
            tensors.append(InspectedTensor(name, "activation", kind, (scale,), (offset,)))
        for what, scales in weights:
            if scales:
                name, kind = f"{record.name}.{what}", record.wts_type.lower()
                zeros = (0,) * len(scales)
                tensors.append(InspectedTensor(name, "weight", kind, scales, zeros))
    return Inspection("AMCT's record", sizes([path]), tuple(tensors))
