"""What a converted model quantizes: the same facts as of a file, from its graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from lightning_qat.export.files.inspection import (
    InspectedLayer,
    InspectedTensor,
    Inspection,
    counted,
    sizes,
)
from lightning_qat.export.promises import JOINS, aten_name, key_behind, operands_of
from lightning_qat.ir.exported_program import module_path
from lightning_qat.ir.ops import layer_of_weight_key, layer_operands
from lightning_qat.ir.quantized_model import QuantizedModel, QuantizedTensor
from lightning_qat.numerics.multiplications import multiplications

_PRODUCTS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul bmm mm "
    "addmm baddbmm einsum scaled_dot_product_attention".split()
)
_FIRST: Mapping[str, int] = {"addmm": 1, "baddbmm": 1}
"""Where the first of the two factors stands, if not first."""


def inspect_model(model: QuantizedModel, path: Path) -> Inspection:
    """What a converted model quantizes and leaves float.

    Args:
        model: The model.
        path: Its file.
    """
    layers, left_float, operators = [], [], []
    for node in model.program.graph.nodes:
        name = aten_name(node)
        if not name:
            continue
        operators.append(name)
        operator = JOINS.get(name)
        keys = () if operator is None else tuple(map(key_behind, operands_of(node, operator)))
        quantized = bool(keys) and None not in keys
        if name in _PRODUCTS:
            call = layer_operands(node)
            place = layer_of_weight_key(call[1].key) if call else module_path(node)
            integer = call is not None or quantized
            layers.append(InspectedLayer(place or node.name, name, integer, _macs(node, name)))
        elif keys and not quantized:
            left_float.append(f"{module_path(node)}.{name}".lstrip("."))
    facts = {
        "inputs": ", ".join(f"{n} {[*shape]}" for n, shape in model.input_shapes.items()),
        "outputs": ", ".join(model.output_names),
        "recurrent layers": ", ".join(call.name for call in model.recurrences),
        "not reached": ", ".join(model.unreached),
        "constant layers": ", ".join(model.constant_layers),
    }
    return Inspection(
        "converted model",
        sizes([path]),
        tuple(map(_tensor, model.tensors.values())),
        tuple(layers),
        counted(operators),
        tuple(left_float),
        {heading: text for heading, text in facts.items() if text},
    )


def _tensor(tensor: QuantizedTensor) -> InspectedTensor:
    qparams = tensor.qparams
    return InspectedTensor(
        tensor.key,
        tensor.kind,
        f"int{qparams.grid.qmax.bit_length() + 1}",
        tuple(qparams.scale.reshape(-1).tolist()),
        tuple(qparams.zero_point.reshape(-1).tolist()),
        qparams.axis,
    )


def _macs(node: fx.Node, name: str) -> int | None:
    """For one sample: a dynamic size counts once."""
    first = _FIRST.get(name, 0)
    if name in ("einsum", "scaled_dot_product_attention"):
        return None
    made, source, weight = (_shape(n) for n in (node, *node.args[first : first + 2]))
    if made is None or source is None or weight is None:
        return None
    if name.startswith("conv"):
        return multiplications(weight, source, made, transposed="transpose" in name)
    return math.prod(made) * source[-1]


def _shape(node: Any) -> list[int] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    return [size if isinstance(size, int) else 1 for size in value.shape]
