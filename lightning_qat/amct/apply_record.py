"""Give a float model the quantization factors that were trained elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.amct.record import LayerRecord
from lightning_qat.convert.convert import convert
from lightning_qat.ir.recurrence import GATES
from lightning_qat.layers import QATLayer
from lightning_qat.layers._recurrent import RecurrentQAT
from lightning_qat.model.inputs import Inputs
from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.quantizers.learned_activation import LearnedStepActivation
from lightning_qat.quantizers.learned_weight import LearnedWeightQuantizer
from lightning_qat.quantizers.names import activation_quantizer_name, weight_quantizer_name
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
    from there. Of an LSTM or GRU of one layer and direction the entry has ``scale_h`` and
    ``scale_r``; its rows are in ONNX's order of gates.

    Args:
        model: Float model whose layers have the record's names as module paths.
        record: The result of ``read_record``.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments
            of ``forward``; the model is converted with them.

    Returns:
        What was swapped, as ``prepare`` reports it.

    Raises:
        ValueError: A layer of the record is not in the model, cannot be quantized, has another
            number of output channels, or is recurrent with several layers or directions; or a type
            is unknown.
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
        _set_activation(layer.input_quantizer, entry.scale_d, entry.offset_d)
        if isinstance(layer, RecurrentQAT):
            _set_recurrent(layer, entry)
        else:
            wanted[entry.name] = _set_weight(layer.weight_quantizer, entry.name, entry.scale_w)
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
        _check_recurrent(entry, modules[entry.name])
        for kind in (entry.act_type, entry.wts_type):
            if kind not in _BITS:
                raise ValueError(f"Types must be among {list(_BITS)}; {entry.name!r} has {kind!r}.")
        module = modules[entry.name]
        weight = getattr(module, "weight_ih_l0" if entry.scale_h else "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"A layer of the record must have a weight; {entry.name!r} has none.")
    return {entry.name: modules[entry.name] for entry in record}


def _check_recurrent(entry: LayerRecord, module: nn.Module) -> None:
    """Raise ``ValueError`` where a record of an LSTM or GRU and its module do not fit."""
    recurrent = isinstance(module, nn.LSTM | nn.GRU)
    if not recurrent and entry.scale_h is None:
        return
    if not recurrent or entry.scale_h is None or not entry.scale_r:
        raise ValueError(
            f"An entry of an LSTM or GRU, and no other, must have scale_h and scale_r; "
            f"{entry.name!r} is a {type(module).__name__} and has "
            f"scale_h {entry.scale_h} and {len(entry.scale_r)} numbers of scale_r."
        )
    if module.num_layers != 1 or module.bidirectional or module.proj_size:
        raise ValueError(
            f"A record has factors for one layer of one direction without a projection; "
            f"{entry.name!r} has num_layers {module.num_layers}, bidirectional "
            f"{module.bidirectional}, proj_size {module.proj_size}."
        )


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


def _set_recurrent(layer: RecurrentQAT, entry: LayerRecord) -> None:
    assert entry.scale_h is not None  # _check_recurrent
    hidden: Any = layer.get_submodule(activation_quantizer_name("hidden", "_l0"))
    _set_activation(hidden, entry.scale_h, entry.offset_h or 0)
    order = GATES["LSTM" if isinstance(layer, nn.LSTM) else "GRU"]
    for name, scales in (("weight_ih_l0", entry.scale_w), ("weight_hh_l0", entry.scale_r)):
        rows: int = getattr(layer, name).shape[0]
        if len(scales) not in (1, len(order), rows):
            raise ValueError(
                f"scale_w and scale_r must have one number, one per gate ({len(order)}) or one per "
                f"row ({rows}); {entry.name!r} has {len(scales)}."
            )
        if len(scales) > 1:
            by_gate = torch.tensor(scales).reshape(len(order), -1).expand(-1, rows // len(order))
            # Where ONNX has the gates that torch has in its own order.
            scales = tuple(
                by_gate[[order.index(gate) for gate in range(len(order))]].flatten().tolist()
            )
        _set_weight(layer.get_submodule(weight_quantizer_name(name)), entry.name, scales)


@torch.no_grad()
def _set_activation(quantizer: Any, scale: float, offset: int) -> None:
    assert isinstance(quantizer, LearnedStepActivation)  # the recipe asks for it
    quantizer.scale.fill_(scale)
    low = (quantizer.grid.qmin - offset) * quantizer.scale
    if quantizer.low is not None:
        quantizer.low.copy_(low)
    quantizer.min_val.copy_(low)
    quantizer.max_val.copy_((quantizer.grid.qmax - offset) * quantizer.scale)
    quantizer.batches.fill_(1)
    quantizer.calibrated = True


@torch.no_grad()
def _set_weight(quantizer: Any, name: str, scales: Sequence[float]) -> Tensor:
    assert isinstance(quantizer, LearnedWeightQuantizer)  # the recipe asks for it
    scale = torch.tensor(scales, dtype=torch.float32)
    if quantizer.scale.dim() and len(scale) % quantizer.scale.numel():
        raise ValueError(
            f"scale_w must have one number or one per output channel "
            f"({quantizer.scale.numel()}); {name!r} has {len(scale)}."
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
