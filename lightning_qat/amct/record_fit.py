"""Whether the layers of a record are those of a model, and what scale each channel of it gets."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.amct.layer_record import (
    ACTIVATION_BITS,
    WEIGHT_BITS,
    LayerRecord,
    record_problems,
    refuse_problems,
)
from lightning_qat.ir.recurrence import GATES
from lightning_qat.layers import QATLayer
from lightning_qat.layers.table import layer_for
from lightning_qat.model.paths import ModelPaths
from lightning_qat.prepare.swap import choose_layers
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec
from lightning_qat.recipe.suggest import closest_names


@dataclass(frozen=True)
class LayerFactors:
    """What a layer of a model shall be quantized with.

    Attributes:
        entry: Its entry in the record.
        module: The float layer.
        scales: Of each weight, by its name in the module, float32: a scalar, or one number per
            output channel in torch's order.
    """

    entry: LayerRecord
    module: nn.Module
    scales: Mapping[str, Tensor]


def fit_record(
    model: nn.Module, record: Sequence[LayerRecord], per_channel: Mapping[nn.Module, object]
) -> tuple[tuple[LayerFactors, ...], Recipe]:
    """The factors of each layer of a float model, and the recipe that gives it quantizers for them.

    Args:
        model: The float model; it stays as it is.
        record: The record.
        per_channel: Layers that get a scale per channel also where the record has one for all.

    Raises:
        ValueError: The record does not fit the model; everything that does not is named.
    """
    record = tuple(record)
    problems = [*record_problems(record)]
    paths = ModelPaths.of(model)
    found: list[LayerFactors] = []
    owners: dict[nn.Module, str] = {}
    for entry in record:
        module = paths.by_path.get(entry.name)
        problem = _module_problem(entry, module, paths)
        if module is not None and problem is None and module in owners:
            problem = f"is the layer {owners[module]!r} under another name; a layer has one entry"
        if module is None or problem is not None:
            problems.append(f"layer {entry.name!r} {problem}")
            continue
        owners[module] = entry.name
        try:
            found.append(LayerFactors(entry, module, _scales(entry, module, module in per_channel)))
        except ValueError as error:
            problems.append(f"layer {entry.name!r}: {error}")
    refuse_problems("A record must fit its model:", problems)
    recipe = _recipe(found, paths)
    skipped = {layer.name: layer.reason for layer in choose_layers(paths, recipe).skipped}
    refuse_problems(
        "Every layer of a record must be one that can be quantized:",
        [
            f"{entry.name!r} cannot be: {skipped[name]}"
            for entry in record
            if (name := paths.name(paths.by_path[entry.name])) in skipped
        ],
    )
    return tuple(found), recipe


def _module_problem(entry: LayerRecord, module: nn.Module | None, paths: ModelPaths) -> str | None:
    if module is None:
        return (
            "must be a module of the model; it is none; "
            f"{closest_names(entry.name[:100], paths.by_path)}"
        )
    if isinstance(module, QATLayer):
        return (
            "is quantized already; apply_record takes a float model and prepares it itself. Build "
            "the model anew, load its weights, and apply the record"
        )
    recurrent = isinstance(module, nn.LSTM | nn.GRU)
    if recurrent != (entry.scale_h is not None):
        return (
            "must have scale_h and scale_r if it is an LSTM or GRU, and no other layer has them; "
            f"it is a {type(module).__name__} and has scale_h {entry.scale_h}"
        )
    if recurrent and (module.num_layers != 1 or module.bidirectional or module.proj_size):
        return (
            "must be one layer of one direction without a projection, of which a record has "
            f"factors; it has num_layers {module.num_layers}, bidirectional "
            f"{module.bidirectional}, proj_size {module.proj_size}"
        )
    if not isinstance(getattr(module, "weight_ih_l0" if recurrent else "weight", None), Tensor):
        return f"must have a weight; {type(module).__name__} has none"
    kind = layer_for(module)
    if kind is None or not kind.quantizes_input:
        return f"must be one that can be quantized; {type(module).__name__} has no input or no form"
    if entry.act_type == "INT16" and (entry.offset_d or entry.offset_h):
        return (
            "must have offset 0: activations of 16 bits are symmetric here, and on every target "
            f"but AMCT's simulation; got offset_d {entry.offset_d}, offset_h {entry.offset_h}"
        )
    return None


def _scales(entry: LayerRecord, module: nn.Module, per_channel: bool) -> dict[str, Tensor]:
    if isinstance(module, nn.LSTM | nn.GRU):
        # Both weights have one spec: where one has a scale per row, the other has, too.
        whole = len(entry.scale_w) == len(entry.scale_r) == 1
        return {
            name: _of_rows(field, scales, module, whole)
            for field, name, scales in (
                ("scale_w", "weight_ih_l0", entry.scale_w),
                ("scale_r", "weight_hh_l0", entry.scale_r),
            )
        }
    kind: Any = layer_for(module)
    weight: Any = module.weight
    channels = weight.shape[kind.channel_axis] * kind.channel_groups(module)
    scale = torch.tensor(entry.scale_w, dtype=torch.float32)
    if len(scale) not in (1, channels):
        raise ValueError(
            f"scale_w must have one number or one per output channel ({channels}); it has "
            f"{len(scale)}"
        )
    if len(scale) == 1 and not per_channel:
        return {"weight": scale.reshape(())}
    return {"weight": scale.expand(channels).clone()}


def _of_rows(field: str, scales: Sequence[float], module: nn.RNNBase, whole: bool) -> Tensor:
    """From ONNX's order of gates to torch's."""
    order = GATES["LSTM" if isinstance(module, nn.LSTM) else "GRU"]
    rows = module.hidden_size * len(order)
    if len(scales) not in (1, len(order), rows):
        raise ValueError(
            f"{field} must have one number, one per gate ({len(order)}) or one per row ({rows}); "
            f"it has {len(scales)}"
        )
    scale = torch.tensor(scales, dtype=torch.float32)
    if whole:
        return scale.reshape(())
    if len(scale) == 1:
        return scale.expand(rows).clone()
    by_gate = scale.reshape(len(order), -1).expand(-1, rows // len(order))
    return by_gate[[order.index(gate) for gate in range(len(order))]].flatten()


def _recipe(found: Sequence[LayerFactors], paths: ModelPaths) -> Recipe:
    """Every layer of the record with learned quantizers, whose numbers can be set."""
    overrides: dict[str, Any] = {}
    for factors in found:
        bits = ACTIVATION_BITS[factors.entry.act_type]
        whole = all(not scale.dim() for scale in factors.scales.values())
        overrides[glob.escape(factors.entry.name)] = {
            # AMCT's grid, -128..127: every integer that any record's layer can have is on it.
            "weight": {
                "bits": WEIGHT_BITS[factors.entry.wts_type],
                "granularity": "per_tensor" if whole else "per_channel",
                "quantizer": "ulq",
            },
            "activation": {"bits": bits, "symmetric": bits == 16, "quantizer": "learned"},
        }
    return Recipe(
        weight=WeightSpec(),
        activation=ActivationSpec(),
        joins=False,
        outputs=False,
        include=tuple(overrides),
        exclude=tuple(map(glob.escape, _layers_within(found, paths))),
        overrides=overrides,
    )


def _layers_within(found: Sequence[LayerFactors], paths: ModelPaths) -> Iterator[str]:
    """Layers inside of the record's that are not in the record: a pattern selects them as well."""
    named = {factors.module for factors in found}
    for factors in found:
        for module in factors.module.modules():
            if module not in named and layer_for(module) is not None:
                yield paths.name(module)
