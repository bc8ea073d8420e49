"""Collect what a page shows from a converted model, its folder's manifest and a few samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_qat.export.promises import float_calls
from lightning_qat.export.protocol import Exporter
from lightning_qat.ir.exported_program import Constants
from lightning_qat.ir.ops import key_of
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.model.inputs import Inputs, as_call, batch_of, first_samples
from lightning_qat.report.activations import measured_tensors
from lightning_qat.report.data import FloatPart, LayerRow, ReportData, Training
from lightning_qat.report.layers import layer_rows
from lightning_qat.report.plan import plan_of
from lightning_qat.report.products import products_of
from lightning_qat.report.targets import target_part

_MEASURED, _COMPARED = 32, 4
"""Samples for the activations' figures, and for the comparison of files: that runs in NumPy."""


def collect(
    model: QuantizedModel,
    manifest: Mapping[str, Any],
    folder: Path,
    name: str,
    *,
    inputs: Inputs | None = None,
    exporters: Sequence[Exporter] = (),
    compare: bool = True,
) -> ReportData:
    """Collect everything.

    Args:
        model: The converted model.
        manifest: What ``export_all`` has written.
        folder: Where it stands, with the files.
        name: The model's name.
        inputs: What ``forward`` takes; the model's example inputs by default.
        exporters: Those that wrote the files, when they have options.
        compare: Compare each file with the model, layer by layer.
    """
    call = model.example_inputs if inputs is None else as_call(inputs)
    measured = _cut(model, call, _MEASURED)
    training = manifest.get("training", {})
    tensors = measured_tensors(model, *measured)
    products = products_of(model)
    layers = layer_rows(
        model,
        {row.name: row for row in tensors},
        products,
        training.get("weight_sqnr_db", {}),
    )
    known = {exporter.name: exporter for exporter in exporters}
    few = _cut(model, call, _COMPARED) if compare else None
    targets = tuple(
        target_part(target, entry, folder, model, known.get(target), few)
        for target, entry in manifest.get("targets", {}).items()
    )
    size, float_size = _sizes(model, layers)
    return ReportData(
        name=name,
        samples=max(1, batch_of(measured)),
        layers=layers,
        tensors=tensors,
        left_float=tuple(_left_float(model, training)),
        products=tuple(products.values()),
        float_bytes=float_size,
        bytes=size,
        plan=plan_of(model),
        targets=targets,
        training=_training(training),
        facts=_facts(model, manifest),
        recipe=manifest.get("recipe", {}),
        cautions=tuple(_cautions(inputs, training)),
    )


def _cut(
    model: QuantizedModel, call: tuple[tuple[Any, ...], dict[str, Any]], count: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first samples, of a model that takes any number."""
    first = next(iter(model.input_shapes.values()), ())
    if first and first[0] == "batch":
        args, kwargs = first_samples(call, count)
        return args, kwargs
    return call


def _left_float(model: QuantizedModel, training: Mapping[str, Any]) -> Iterator[FloatPart]:
    """As ``prepare`` has said it, where that is known; else what the graph shows."""
    if "left_float" in training:
        for name, kind, reason in training["left_float"]:
            yield FloatPart(name, kind, reason)
    else:
        for key in model.unreached:
            yield FloatPart(key, "", "planned, but the exported forward does not reach it")
        for call in float_calls(model):
            read = f"{call.in_float} of {call.operands} tensors"
            name = f"{call.place}.{call.function}".strip(".")
            why = "its tensor is" if call.operands == 1 else f"{read} that it reads are"
            yield FloatPart(name, call.function, f"{why} not quantized")
    for layer in model.constant_layers:
        yield FloatPart(layer, "", "depends on no input: files hold its result")


def _sizes(model: QuantizedModel, layers: Sequence[LayerRow]) -> tuple[int, int]:
    """Bytes of all parameters: with integer weights and their scales, and in float32."""
    constants, others = Constants(model.program), 0
    for node in model.program.graph.nodes:
        value = constants.value(node)
        # What only quantizations read are integers, scales and zero points.
        if value is not None and any(key_of(user) is None for user in node.users):
            others += value.numel() * value.element_size()
    weights = [tensor for tensor in model.tensors.values() if tensor.kind == "weight"]
    scales = sum(4 * tensor.qparams.scale.numel() for tensor in weights)
    integers = sum(layer.bytes for layer in layers)
    return integers + scales + others, sum(layer.float_bytes for layer in layers) + others


def _training(stored: Mapping[str, Any]) -> Training:
    return Training(
        tuple((int(step), float(loss)) for step, loss in stored.get("loss", ())),
        tuple((int(step), str(phase)) for step, phase in stored.get("phases", ())),
    )


def _facts(model: QuantizedModel, manifest: Mapping[str, Any]) -> dict[str, str]:
    shapes = manifest.get("input_shapes", {})
    facts = {
        "Inputs": ", ".join(
            f"{name} ({', '.join(map(str, shapes.get(name, ())))})" for name in model.input_names
        ),
        "Outputs": ", ".join(model.output_names),
        "Python": str(manifest.get("python", "")),
    }
    return {**facts, **{str(k): str(v) for k, v in manifest.get("versions", {}).items()}}


def _cautions(inputs: Inputs | None, training: Mapping[str, Any]) -> Iterator[str]:
    if inputs is None:
        yield (
            "Activations are those of the model's example inputs. Real data tell more: "
            "lightning-qat report FOLDER --inputs samples.npz."
        )
    if not training:
        yield (
            "The manifest holds nothing of a training run, so phases, losses, the noise of "
            "weights, and reasons that prepare gave are not shown."
        )
