"""Give a float model the quantization factors that were trained elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.amct.folded_scales import following_norms, set_folded_scales
from lightning_qat.amct.layer_record import LayerRecord, refuse_problems
from lightning_qat.amct.record_fit import LayerFactors, fit_record
from lightning_qat.model.inputs import Inputs
from lightning_qat.model.paths import ModelPaths
from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.quantizers.learned_activation import LearnedStepActivation
from lightning_qat.quantizers.learned_weight import LearnedWeightQuantizer
from lightning_qat.quantizers.names import activation_quantizer_name, weight_quantizer_name


def apply_record(
    model: nn.Module, record: Sequence[LayerRecord], example_inputs: Inputs
) -> PrepareReport:
    """Prepare a float model in place so that it converts to the factors of a record, to the bit.

    Layers that the record does not name stay float, and joins and outputs too: a record knows the
    inputs and weights of layers only. ``scale_w`` is that of the weight with batch norm folded; the
    scale before folding is found by converting and comparing, and where no float32 scale gives it,
    the batch norm's running variance moves by a few float32 steps. A layer in front of a batch norm
    has a scale per channel then, also where the record has one for all. Factors are parameters and
    train on from there. Of an LSTM or GRU of one layer and direction the entry has ``scale_h`` and
    ``scale_r``; its rows are in ONNX's order of gates.

    Args:
        model: Float model whose layers have the record's names as module paths.
        record: The result of ``read_record``.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments
            of ``forward``; the model is converted with them.

    Returns:
        What was swapped, as ``prepare`` reports it.

    Raises:
        ValueError: A factor is no number of its type's grid, a layer of the record is not in the
            model, comes twice, cannot be quantized, has another number of output channels, or is
            recurrent with several layers or directions, or an input of 16 bits has an offset: all
            of it is named and the model is unchanged. Or a scale cannot be reached through what is
            folded into the weight; the model is prepared then.
        CaptureError: The model cannot be captured.
    """
    record = tuple(record)
    paths = ModelPaths.of(model)
    named = {paths.by_path[entry.name] for entry in record if entry.name in paths.by_path}
    norms = following_norms(model, named, example_inputs)
    fitting, recipe = fit_record(model, record, norms)
    report = prepare(model, recipe)
    wanted: dict[str, tuple[Any, Tensor]] = {}
    for factors in fitting:
        _set_layer(factors)
        if "weight" in factors.scales:
            quantizer = factors.module.get_submodule(weight_quantizer_name("weight"))
            wanted[paths.name(factors.module)] = quantizer, factors.scales["weight"]
    by_name = {paths.name(layer): norm for layer, norm in norms.items()}
    left = set_folded_scales(model, wanted, by_name, example_inputs)
    refuse_problems(
        "Every scale of a record must be reached with what is folded into its weight. Fold batch "
        "norm first (torch.nn.utils.fusion.fuse_conv_bn_eval, in the float model) and give one "
        "number per output channel. Not reached:",
        left,
    )
    return report


def _set_layer(factors: LayerFactors) -> None:
    layer: Any = factors.module
    entry = factors.entry
    _set_activation(layer.input_quantizer, entry.scale_d, entry.offset_d)
    if entry.scale_h is not None and entry.offset_h is not None:
        hidden = layer.get_submodule(activation_quantizer_name("hidden", "_l0"))
        _set_activation(hidden, entry.scale_h, entry.offset_h)
    for name, scale in factors.scales.items():
        _set_weight(layer.get_submodule(weight_quantizer_name(name)), scale)


@torch.no_grad()
def _set_activation(quantizer: Any, scale: float, offset: int) -> None:
    assert isinstance(quantizer, LearnedStepActivation)  # the recipe asks for it
    step = torch.full_like(quantizer.min_val, scale)
    quantizer.start_from_step(step)
    low = (quantizer.grid.qmin - offset) * step
    if quantizer.low is not None:
        quantizer.low.copy_(low)
    quantizer.min_val.copy_(low)
    quantizer.max_val.copy_((quantizer.grid.qmax - offset) * step)
    quantizer.batches.fill_(1)
    quantizer.calibrated = True


@torch.no_grad()
def _set_weight(quantizer: Any, scale: Tensor) -> None:
    assert isinstance(quantizer, LearnedWeightQuantizer)  # the recipe asks for it
    assert quantizer.half_width.shape == scale.shape
    quantizer.start_from_step(scale)
