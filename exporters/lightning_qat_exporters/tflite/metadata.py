"""Write a signature, the names of tensors and our metadata entry into an unpacked file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from lightning_qat_exporters.tflite.flatbuffer.file import METADATA, schema
from lightning_qat_exporters.tflite.flatbuffer.match_layers import MatchedLayers


def sign(file: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Add a signature to an unpacked file that has none, in place.

    Args:
        file: An unpacked file.
        inputs: Names of the main graph's inputs, in order.
        outputs: Names of its outputs, in order.
    """
    if file.signatureDefs:
        return
    s, graph = schema(), file.subgraphs[0]
    signature = s.SignatureDefT()
    signature.signatureKey = "serving_default"
    for indices, names, role in (
        (graph.inputs, inputs, "inputs"),
        (graph.outputs, outputs, "outputs"),
    ):
        entries = []
        for index, name in zip(indices, names, strict=True):
            entry = s.TensorMapT()
            entry.name, entry.tensorIndex = name.encode(), int(index)
            entries.append(entry)
        setattr(signature, role, entries)
    file.signatureDefs = [signature]


def describe(
    file: Any,
    layers: MatchedLayers,
    *,
    backend: str,
    layout: str,
    batch_axes: Mapping[str, int],
) -> None:
    """Name the tensors of an unpacked file, add a description and our metadata entry, in place.

    Inputs and outputs are called as in the signature. The output of a layer is called like the
    layer, its weight and bias ``<layer>.weight`` and ``<layer>.bias``. Nothing that depends on the
    machine or the time of writing is added.

    Args:
        file: An unpacked file with a signature.
        layers: The model's layers in the file.
        backend: Name of the backend that made it.
        layout: ``nhwc`` or ``nchw``, of 4-D inputs and outputs.
        batch_axes: Where in torch's layout outputs have the batch, if not first.
    """
    _name_tensors(file, layers)
    own = version("lightning-qat")
    file.description = f"Quantized with lightning-qat {own}, written by its {backend} backend"
    facts: dict[str, Any] = {"version": own, "backend": backend, "layout": layout}
    if batch_axes:
        facts["batch_axes"] = dict(batch_axes)
    _add_entry(file, facts)


def _name_tensors(file: Any, layers: MatchedLayers) -> None:
    tensors, signature = file.subgraphs[0].tensors, file.signatureDefs[0]
    names: dict[int, str] = {
        int(entry.tensorIndex): entry.name.decode()
        for entry in (*signature.inputs, *signature.outputs)
    }
    calls: dict[str, int] = {}
    for layer, stored in layers:
        name = layer.name or "layer"
        number = calls[name] = calls.get(name, -1) + 1
        if stored is None:
            continue
        # A layer that is called twice, or is equal to another, may have its constants shared.
        names.setdefault(stored.operator.outputs[0], f"{name}_{number}" if number else name)
        names.setdefault(stored.weight, layer.weight_key)
        if stored.bias is not None:
            names.setdefault(stored.bias, f"{name}.bias")
    for index, text in names.items():
        tensors[index].name = text.encode()


def _add_entry(file: Any, facts: Mapping[str, Any]) -> None:
    s = schema()
    buffer, entry = s.BufferT(), s.MetadataT()
    buffer.data = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    file.buffers.append(buffer)
    entry.name, entry.buffer = METADATA, len(file.buffers) - 1
    file.metadata = [*(file.metadata or []), entry]
