"""Everything in a converted model that multiplies matrices, and the bits of its factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from lightning_qat.export.promises import JOINS, aten_name, key_behind, operands_of
from lightning_qat.ir.exported_program import module_path
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.multiplications import multiplications
from lightning_qat.report.activations import bits_of
from lightning_qat.report.data import Product

_FLOAT = 32
_MATRICES = {"matmul", "baddbmm", "addmm"}


def products_of(model: QuantizedModel) -> Mapping[str, Product]:
    """Layers and products of two tensors by the names of their nodes, quantized or not.

    Of one sample: the size of the example's first axis is divided out. Element-wise products are
    none: they are as many as the values. What is inside ``einsum`` and attention in one operator is
    counted as the two matrices that it multiplies.
    """
    layers = {layer.node: layer.name for layer in model.layers}
    samples = _samples(model)
    found = {}
    for node in model.program.graph.nodes:
        operator = JOINS.get(aten_name(node))
        if operator is None and node.name not in layers:
            continue
        function = "linear" if operator is None else operator.name
        count = _multiplications(node, function)
        if count is None:
            continue
        name = layers.get(node.name)
        if name is None:
            name = f"{module_path(node)}.{function}".lstrip(".")
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if operator is not None:
            operands = [*operands_of(node, operator)][:2]
        bits = tuple(_bits(model, operand) for operand in operands)
        first, second = bits if len(bits) == 2 else (_FLOAT, _FLOAT)
        found[node.name] = Product(name or "layer", count // samples, (first, second))
    return found


def _multiplications(node: fx.Node, function: str) -> int | None:
    """Of the example; ``None``: it multiplies no matrices."""
    written = _shape(node)
    if function == "linear" or function.startswith("conv"):
        read, weight = (_shape(arg) for arg in node.args[:2])
        return multiplications(weight, read, written, transposed="transpose" in function)
    if function in _MATRICES:
        first = node.args[1] if function in ("baddbmm", "addmm") else node.args[0]
        shape = _shape(first)
        return math.prod(written) * (shape[-1] if shape else 1)
    if function == "scaled_dot_product_attention":
        query, key, value = (_shape(arg) for arg in node.args[:3])
        scores = math.prod(query[:-1]) * key[-2]
        return scores * (query[-1] + value[-1])
    if function == "einsum":
        return _of_einsum(node)
    return None


def _of_einsum(node: fx.Node) -> int | None:
    """Of two tensors: the product of the sizes of all letters."""
    equation, operands = node.args[0], node.args[1]
    inputs = str(equation).replace(" ", "").partition("->")[0].split(",")
    if not isinstance(operands, list | tuple) or len(inputs) != len(operands) or len(inputs) != 2:
        return None
    shapes = [_shape(operand) for operand in operands]
    if any(len(names) != len(shape) for names, shape in zip(inputs, shapes, strict=True)):
        return None  # an ellipsis
    return math.prod(dict(zip("".join(inputs), (*shapes[0], *shapes[1]), strict=True)).values())


def _bits(model: QuantizedModel, operand: fx.Node) -> int:
    key = key_behind(operand)
    return _FLOAT if key is None else bits_of(model.tensors[key].qparams.grid)


def _shape(node: Any) -> tuple[int, ...]:
    """The shape that a node's tensor had when the graph was captured."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return ()
    return tuple(
        size if isinstance(size, int) else int(size.node.hint or 1) for size in value.shape
    )


def _samples(model: QuantizedModel) -> int:
    """Size of the batch of the example."""
    first = next(iter(model.input_shapes.values()), ())
    args, kwargs = model.example_inputs
    if not first:
        return 1
    tensors = model.flat_inputs(args, kwargs)
    return max(1, next(iter(tensors.values())).shape[0])
