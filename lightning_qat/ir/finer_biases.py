"""Weights of few bits on a finer grid, so that integer biases are fine enough."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from lightning_qat.ir.exported_program import Constants, clean_up, copied
from lightning_qat.ir.ops import DequantizeCall, as_dequantize, layer_operands
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.arithmetic import accumulator_scale
from lightning_qat.numerics.qparams import IntegerGrid

MOST = 64
"""The largest integer of a weight that is put on a finer grid.

Two products of it and of a uint8 fit into the 16 bits that CPUs without VNNI add them in.
"""
_MOST_OF_BIAS = 2**30
"""Half of int32 is left to what is added to a bias."""


def with_finer_biases(model: QuantizedModel, *, keep: IntegerGrid | None = None) -> QuantizedModel:
    """The same function, with integers ``2**k`` times as large and scales ``2**-k`` times.

    Integer targets round a bias to steps of ``input scale * weight scale``, which training does not
    see. At 8 bits that step is small; at 4 bits for weights and inputs it is 290 times as large.
    Weights of few bits are stored in 8 bits anyway: with their integers times ``2**k`` each weight
    is the same to the bit, and the bias has ``2**k`` times as many steps.

    Only weights that layers with a bias read are changed, as far as integers stay within
    ``MOST`` and biases within half of int32. The exporters for integer targets call it.

    Args:
        model: Stays as it is.
        keep: Weights on this grid stay as they are: they are stored in as few bits.

    Returns:
        The model itself where nothing is to change.
    """
    factors = {key: factor for key, factor in _factors(model, keep).items() if factor > 1}
    if not factors:
        return model
    program = copied(model.program)
    constants = Constants(program)
    for node in list(program.graph.nodes):
        call = as_dequantize(node)
        if call is not None and call.key in factors:
            node.args = _finer(call, factors[call.key], constants).args
    clean_up(program)
    return replace(model, program=program)


def finer_by(integer: int, steps: float, smallest: float) -> int:
    """The largest power of two that a layer's weight and its bias have room for.

    Args:
        integer: The largest absolute integer of the weight.
        steps: The largest absolute value of the bias, in steps of the accumulator.
        smallest: The smallest scale, and step of the accumulator.

    Example:
        >>> finer_by(8, 100.0, 1e-3), finer_by(127, 100.0, 1e-3), finer_by(1, 2.0**28, 1e-3)
        (8, 1, 4)
    """
    # What is below float32's normal numbers is no longer the same when it is divided.
    normal = smallest / torch.finfo(torch.float32).tiny
    room = int(min(MOST / max(integer, 1), _MOST_OF_BIAS / max(steps, 1.0), normal))
    return 1 << max(room, 1).bit_length() - 1


def _factors(model: QuantizedModel, keep: IntegerGrid | None) -> dict[str, int]:
    """How many times as large the integers of each weight may be, by its key."""
    constants = Constants(model.program)
    factors: dict[str, int] = {}
    for node in model.program.graph.nodes:
        call = as_dequantize(node)
        if call is None:
            continue
        integers, factor = constants.value(call.integers), 1
        if integers is not None and integers.numel() and call.grid != keep:
            # Not of abs(): that of -128 is no int8.
            largest = max(int(integers.max()), -int(integers.min()))
            if 2 * largest <= MOST:
                factor = min(_of_reader(user, call, largest, constants) for user in node.users)
        factors[call.key] = min(factor, factors.get(call.key, factor))
    return factors


def _of_reader(layer: fx.Node, weight: DequantizeCall, largest: int, constants: Constants) -> int:
    """The factor that a reader of a weight has room for; 1 for what is no layer with a bias."""
    operands = layer_operands(layer)
    if operands is None or operands[1].key != weight.key or len(layer.args) < 3:
        return 1
    scale, input_scale, bias = map(
        constants.value, (weight.scale, operands[0].scale, layer.args[2])
    )
    if scale is None or input_scale is None or bias is None:
        return 1
    step = accumulator_scale(input_scale, scale, bias.numel())
    steps = float((bias.abs().double() / step.double()).max())
    return finer_by(largest, steps, min(float(scale.min()), float(step.min())))


def _finer(call: DequantizeCall, factor: int, constants: Constants) -> DequantizeCall:
    integers, scale = constants.value(call.integers), constants.value(call.scale)
    assert integers is not None
    assert scale is not None
    return call._replace(
        integers=constants.add(f"{call.key}.finer_integers", integers * factor),
        scale=constants.add(f"{call.key}.finer_scale", scale / factor),
        grid=IntegerGrid(-MOST, MOST),
    )
