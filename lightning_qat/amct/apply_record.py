"""Give a float model the quantization factors that were trained elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.amct.record import LayerRecord
from lightning_qat.convert.convert import convert
from lightning_qat.layers import QATLayer
from lightning_qat.model.inputs import Inputs
from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.quantizers.learned_activation import LearnedStepActivation
from lightning_qat.quantizers.learned_weight import LearnedWeightQuantizer
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec
from lightning_qat.recipe.suggest import closest_names

_BITS = {"INT4": 4, "INT8": 8, "INT16": 16}
# Twice suffices for a product that rounds; the third time finds nothing to do.
_ROUNDS = 3


def apply_record(
    model: nn.Module, record: Sequence[LayerRecord], example_inputs: Inputs
) -> PrepareReport:
    """Prepare a float model in place so that it converts to the factors of a record.

    Layers that the record does not name stay float, and joins and outputs too: a record knows the
    inputs and weights of layers only. ``scale_w`` is that of the weight with batch norm folded; the
    scale before folding is found by converting and comparing. Factors are parameters and train on
    from there.

    Args:
        model: Float model whose layers have the record's names as module paths.
        record: The result of ``read_record``.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments
            of ``forward``; the model is converted with them.

    Returns:
        What was swapped, as ``prepare`` reports it.

    Raises:
        ValueError: A layer of the record is not in the model, is recurrent, cannot be quantized,
            or has another number of output channels; or a type is unknown.
    """
    layers = _named_layers(model, record)
    report = prepare(model, _recipe(record))
    wanted: dict[str, Tensor] = {}
    for entry in record:
        layer = layers[entry.name]
        if not isinstance(layer, QATLayer):
            reasons = "; ".join(str(s) for s in report.skipped)
            raise ValueError(
                f"Every layer of the record must be one that can be quantized; {entry.name!r} "
                f"cannot be: {reasons}."
            )
        _set_input(layer, entry)
        wanted[entry.name] = _set_weight(layer, entry)
    _undo_folding(model, layers, wanted, example_inputs)
    return report


def _named_layers(model: nn.Module, record: Sequence[LayerRecord]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    for entry in record:
        if entry.name not in modules:
            raise ValueError(
                f"Every layer of the record must be a module of the model; {entry.name!r} is none; "
                f"{closest_names(entry.name, modules)}."
            )
        if isinstance(modules[entry.name], QATLayer):
            raise ValueError(
                f"apply_record takes a float model and prepares it itself; {entry.name!r} is "
                "quantized already. Build the model anew, load its weights, and apply the record."
            )
        if entry.scale_h is not None:
            raise ValueError(
                f"A record of LSTM or GRU cannot be applied; {entry.name!r} has scale_h."
            )
        for kind in (entry.act_type, entry.wts_type):
            if kind not in _BITS:
                raise ValueError(f"Types must be among {list(_BITS)}; {entry.name!r} has {kind!r}.")
        weight = getattr(modules[entry.name], "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"A layer of the record must have a weight; {entry.name!r} has none.")
    return {entry.name: modules[entry.name] for entry in record}


def _recipe(record: Sequence[LayerRecord]) -> Recipe:
    """Every layer of the record with learned quantizers, whose numbers can be set."""
    overrides: dict[str, Any] = {}
    for entry in record:
        granularity = "per_channel" if len(entry.scale_w) > 1 else "per_tensor"
        overrides[entry.name] = {
            # AMCT's grid, -128..127: every integer that any record's layer can have is on it.
            "weight": {
                "bits": _BITS[entry.wts_type],
                "granularity": granularity,
                "quantizer": "ulq",
            },
            "activation": {"bits": _BITS[entry.act_type], "quantizer": "learned"},
        }
    plain = Recipe(weight=WeightSpec(), activation=ActivationSpec(), joins=False, outputs=False)
    return replace(plain, include=tuple(overrides), overrides=overrides)


@torch.no_grad()
def _set_input(layer: QATLayer, entry: LayerRecord) -> None:
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, LearnedStepActivation)  # the recipe asks for it
    quantizer.scale.fill_(entry.scale_d)
    low = (quantizer.grid.qmin - entry.offset_d) * quantizer.scale
    if quantizer.low is not None:
        quantizer.low.copy_(low)
    quantizer.min_val.copy_(low)
    quantizer.max_val.copy_((quantizer.grid.qmax - entry.offset_d) * quantizer.scale)
    quantizer.batches.fill_(1)
    quantizer.calibrated = True


@torch.no_grad()
def _set_weight(layer: QATLayer, entry: LayerRecord) -> Tensor:
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, LearnedWeightQuantizer)  # the recipe asks for it
    scale = torch.tensor(entry.scale_w, dtype=torch.float32)
    if quantizer.scale.dim() and len(scale) % quantizer.scale.numel():
        raise ValueError(
            f"scale_w must have one number or one per output channel "
            f"({quantizer.scale.numel()}); {entry.name!r} has {len(scale)}."
        )
    scale = scale[: quantizer.scale.numel()].reshape(quantizer.scale.shape)
    quantizer.scale.copy_(scale)
    quantizer.started.fill_(1)
    quantizer.ready = True
    return scale


@torch.no_grad()
def _undo_folding(
    model: nn.Module,
    layers: dict[str, nn.Module],
    wanted: dict[str, Tensor],
    example_inputs: Inputs,
) -> None:
    """Set scales so that, with batch norm folded, they are the wanted ones to the last bit."""
    for attempt in range(_ROUNDS):
        converted = convert(model, example_inputs)
        found = {
            layer.name: converted.tensors[layer.weight_key].qparams.scale
            for layer in converted.layers
        }
        if all(torch.equal(found[name], scale) for name, scale in wanted.items()):
            return
        for name, scale in wanted.items():
            quantizer: Any = layers[name].weight_quantizer
            own = quantizer.scale.cpu()
            if attempt == 0:
                corrected = own * (scale.double() / found[name].double()).float()
            else:
                toward = torch.where(found[name] > scale, 0.0, torch.inf)
                step = torch.nextafter(own, toward)
                corrected = torch.where(found[name] == scale, own, step)
            quantizer.scale.copy_(corrected)
