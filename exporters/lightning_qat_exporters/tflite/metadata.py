"""Put names and facts into a ``.tflite`` file: what is called how, and who wrote it."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import numpy as np

from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.tflite.flatbuffer.file import (
    METADATA,
    TFLiteFile,
    pack,
    read,
    schema,
    unpack,
)
from lightning_qat_exporters.tflite.flatbuffer.match_layers import matched


def described(content: bytes, model: QuantizedModel, *, backend: str, layout: str) -> bytes:
    """A file with the model's names, a signature, a description and our metadata entry.

    Inputs and outputs are called as in the model, in a signature and as tensors. What a layer
    computes is called like the layer, its weight and bias ``<layer>.weight`` and ``<layer>.bias``.
    Nothing of the machine or the time of writing is in it.

    Args:
        content: A file with or without a signature; without one, inputs and outputs are in the
            order of the model's.
        model: What it was made of.
        backend: Which backend made it.
        layout: ``nhwc`` or ``nchw``, of 4-D inputs and outputs.
    """
    file = unpack(content)
    if not file.signatureDefs:
        _sign(file, model)
    _name_tensors(file, read(content), model)
    own = version("lightning-qat")
    file.description = f"Quantized with lightning-qat {own}, written by its {backend} backend"
    _add_entry(file, {"version": own, "backend": backend, "layout": layout})
    return pack(file)


def _sign(file: Any, model: QuantizedModel) -> None:
    s, graph = schema(), file.subgraphs[0]
    signature = s.SignatureDefT()
    signature.signatureKey = "serving_default"
    for indices, names, role in (
        (graph.inputs, model.input_names, "inputs"),
        (graph.outputs, model.output_names, "outputs"),
    ):
        entries = []
        for index, name in zip(indices, names, strict=True):
            entry = s.TensorMapT()
            entry.name, entry.tensorIndex = name.encode(), int(index)
            entries.append(entry)
        setattr(signature, role, entries)
    file.signatureDefs = [signature]


def _name_tensors(file: Any, plain: TFLiteFile, model: QuantizedModel) -> None:
    tensors, signature = file.subgraphs[0].tensors, file.signatureDefs[0]
    names: dict[int, str] = {
        int(entry.tensorIndex): entry.name.decode()
        for entry in (*signature.inputs, *signature.outputs)
    }
    calls: dict[str, int] = {}
    for layer, stored in matched(plain, model):
        name = layer.name or "layer"
        number = calls[name] = calls.get(name, -1) + 1
        if stored is None:
            continue
        # A layer that is called twice, or is equal to another, may have its constants shared.
        names.setdefault(stored.operator.outputs[0], f"{name}_{number}" if number else name)
        names.setdefault(stored.weight, layer.weight_key)
        if stored.bias is not None:
            names.setdefault(plain.tensors.index(stored.bias), f"{name}.bias")
    for index, text in names.items():
        tensors[index].name = text.encode()


def _add_entry(file: Any, facts: dict[str, str]) -> None:
    s = schema()
    buffer, entry = s.BufferT(), s.MetadataT()
    buffer.data = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    file.buffers.append(buffer)
    entry.name, entry.buffer = METADATA, len(file.buffers) - 1
    file.metadata = [*(file.metadata or []), entry]
