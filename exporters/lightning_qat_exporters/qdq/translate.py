"""The captured program as ``torch.onnx`` translates it, once for all exporters.

Our two operators become ``QuantizeLinear`` and ``DequantizeLinear`` that are marked with the key of
their tensor; scales and zero points are given to them later, by that key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import fx
from torch.export import ExportedProgram

import lightning_qat_exporters.qdq.recurrent  # noqa: F401  # registers lstm and gru
from lightning_qat.ir.exported_program import Constants, clean_up, copied
from lightning_qat.ir.ops import DEQUANTIZE, FAKE_QUANTIZE, as_dequantize, as_fake_quantize
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat_exporters.qdq.private_onnxscript import (
    decomposing_in_place,
    splits_sought_at_slices,
)
from lightning_qat_exporters.quiet import without_remarks

KEY = "lightning_qat.key"
"""Metadata of a node: the keys, a line each, of the quantized tensors that it belongs to."""


_IGNORED = ((".*LeafSpec", FutureWarning),)
"""torch's own use of its own deprecated LeafSpec; its logger names packages that are not needed."""

_TRANSLATED: WeakKeyDictionary[QuantizedModel, dict[int, ir.Model]] = WeakKeyDictionary()


def translated(model: QuantizedModel, opset: int) -> ir.Model:
    """What ``torch.onnx`` makes of a model's program; made once for all exporters.

    Args:
        model: The converted model.
        opset: 18 or newer.

    Returns:
        A model that is not to be changed. ``QuantizeLinear`` and ``DequantizeLinear`` are marked
        with ``KEY``; their scales and zero points mean nothing.
    """
    by_opset = _TRANSLATED.setdefault(model, {})
    if opset not in by_opset:
        with without_remarks("torch.onnx", _IGNORED), decomposing_in_place():
            program = torch.onnx.export(
                _with_few_constants(model),
                (),
                dynamo=True,
                opset_version=opset,
                optimize=False,
                verbose=False,
                input_names=list(model.input_names),
                output_names=list(model.output_names),
                custom_translation_table={
                    FAKE_QUANTIZE: _quantize_dequantize,
                    DEQUANTIZE: _dequantize,
                    torch.ops.lightning_qat_exporters.lstm.default: _lstm,
                    torch.ops.lightning_qat_exporters.gru.default: _gru,
                },
            )
            assert program is not None
            _optimize(program)
        _share_pairs(program.model.graph, model)
        by_opset[opset] = program.model
    return by_opset[opset]


def _with_few_constants(model: QuantizedModel) -> ExportedProgram:
    """The program with one scale and one zero point for all tensors of a shape.

    ``_give_constants`` has the real ones. torch walks over all constants for each of them, and
    takes time for each, so with thousands of scales it took most of its time for these.
    """
    program = copied(model.program)
    constants = Constants(program)
    first: dict[Any, fx.Node] = {}

    def shared(node: fx.Node) -> fx.Node:
        value = constants.value(node)
        assert value is not None  # QuantizedModel looked
        return first.setdefault((value.dtype, value.shape), node)

    for node in program.graph.nodes:
        activation, weight = as_fake_quantize(node), as_dequantize(node)
        if activation is not None:
            node.update_arg(1, shared(activation.scale))
            node.update_arg(2, shared(activation.zero_point))
        elif weight is not None:
            node.update_arg(1, shared(weight.scale))
    clean_up(program)
    return program


def _quantize_dequantize(
    x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int, key: str
) -> Any:
    # Scale and zero point get their final values and types in _give_constants.
    integer_zero: Any = op.Cast(zero_point, to=ir.DataType.INT8)
    quantized = op.QuantizeLinear(x, scale, integer_zero)
    return _marked(op.DequantizeLinear(_marked(quantized, key), scale), key)


def _dequantize(integers: Any, scale: Any, qmin: int, qmax: int, axis: int | None, key: str) -> Any:
    real = (
        op.DequantizeLinear(integers, scale)
        if axis is None
        else op.DequantizeLinear(integers, scale, axis=axis)
    )
    return _marked(real, key)


def _lstm(x: Any, w: Any, r: Any, b: Any, h: Any, c: Any) -> Any:
    return op.LSTM(x, w, r, b, None, h, c, hidden_size=h.shape[-1])


def _gru(x: Any, w: Any, r: Any, b: Any, h: Any) -> Any:
    # torch applies the reset gate behind the product.
    return op.GRU(x, w, r, b, None, h, hidden_size=h.shape[-1], linear_before_reset=1)


def _marked(value: Any, key: str) -> Any:
    value.producer().metadata_props[KEY] = key
    return value


def keys_of(props: Mapping[str, str]) -> list[str]:
    """The keys of the quantized tensors that a node belongs to, by its metadata."""
    return props[KEY].split("\n") if KEY in props else []


def _optimize(program: torch.onnx.ONNXProgram) -> None:
    """torch.onnx's own clean-up, which must not take one layer's quantization for another's.

    It merges nodes with the same inputs and attributes, and so the weights of layers that hold the
    same numbers, such as copies that were not trained apart. A key among the attributes tells
    them apart.
    """
    for node in program.model.graph:
        for key in keys_of(node.metadata_props):
            node.attributes[KEY] = ir.AttrString(KEY, key)
    with splits_sought_at_slices():
        program.optimize()
    for node in program.model.graph:
        node.attributes.pop(KEY, None)


def _share_pairs(graph: ir.Graph, model: QuantizedModel) -> None:
    """Readers of one tensor with the same scale, zero point and grid share one pair, in place."""
    first: dict[tuple[ir.Value | None, bytes, bytes, IntegerGrid], ir.Node] = {}
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or KEY not in node.metadata_props:
            continue
        qparams = model.tensors[node.metadata_props[KEY]].qparams
        numbers = qparams.scale.numpy().tobytes(), qparams.zero_point.numpy().tobytes()
        shared = first.setdefault((node.inputs[0], *numbers, qparams.grid), node)
        if shared is node:
            continue
        (real,), (shared_real,) = node.outputs[0].consumers(), shared.outputs[0].consumers()
        if real.outputs[0].is_graph_output():
            continue
        for pair in (shared, shared_real):
            pair.metadata_props[KEY] += f"\n{node.metadata_props[KEY]}"
        ir.convenience.replace_all_uses_with(real.outputs[0], shared_real.outputs[0])
        graph.remove((real, node), safe=True)
