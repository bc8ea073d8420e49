"""The quantized layers of a converted model, and their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import fx

from lightning_qat.ir.quantized_model import QuantizedModel, QuantizedTensor
from lightning_qat.report.activations import BINS, bits_of
from lightning_qat.report.data import Histogram, LayerRow, Product, TensorRow


def layer_rows(
    model: QuantizedModel,
    tensors: Mapping[str, TensorRow],
    products: Mapping[str, Product],
    weight_sqnr: Mapping[str, float],
) -> tuple[LayerRow, ...]:
    """One row per call of a layer.

    Args:
        model: The converted model.
        tensors: The quantized activations by name.
        products: What multiplies, by the name of its node.
        weight_sqnr: Of weights by their keys, as far as they are known.
    """
    return tuple(_rows(model, tensors, products, weight_sqnr))


def _rows(
    model: QuantizedModel,
    tensors: Mapping[str, TensorRow],
    products: Mapping[str, Product],
    weight_sqnr: Mapping[str, float],
) -> Iterator[LayerRow]:
    nodes = {node.name: node for node in model.program.graph.nodes}
    names = {call.node: call.name for call in model.calls}
    counted: set[str] = set()
    for layer in model.layers:
        node, weight = nodes[layer.node], model.tensors[layer.weight_key]
        assert weight.integers is not None
        source = node.args[0]
        assert isinstance(source, fx.Node)
        scale = weight.qparams.scale
        yield LayerRow(
            name=layer.name or "layer",
            kind=_kind(node, layer.name),
            bits=bits_of(weight.qparams.grid),
            channels=0 if weight.qparams.axis is None else scale.numel(),
            scale_low=float(scale.min()),
            scale_high=float(scale.max()),
            shape=tuple(weight.integers.shape),
            weights=0 if weight.key in counted else weight.integers.numel(),
            sqnr_db=weight_sqnr.get(weight.key),
            multiplications=products[layer.node].multiplications,
            input=tensors[names[source]],
            histogram=_histogram(weight),
        )
        counted.add(weight.key)


def _kind(node: fx.Node, name: str) -> str:
    """The float layer's class where a layer calls, else the operator."""
    stack = [*(node.meta.get("nn_module_stack") or {}).values()]
    path, cls = stack[-1] if stack else ("", "")
    if str(path).split("@")[0] == name and name:
        return str(getattr(cls, "__name__", cls)).rpartition(".")[2].removesuffix("QAT")
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", node.name))


def _histogram(weight: QuantizedTensor) -> Histogram:
    """Of the integers: a bar for each of a few bits, for so many of them where there are more."""
    assert weight.integers is not None
    grid, axis = weight.qparams.grid, weight.qparams.axis
    per_bin = -(-(grid.qmax - grid.qmin + 1) // BINS)
    bins = -(-(grid.qmax - grid.qmin + 1) // per_bin)
    low, high = grid.qmin - 0.5, grid.qmin - 0.5 + bins * per_bin
    counts, _ = np.histogram(weight.integers.numpy(), bins, (low, high))
    step = 1.0 if axis is not None else float(weight.qparams.scale)
    return Histogram(
        low * step,
        high * step,
        tuple(map(int, counts)),
        grid.qmin * step,
        grid.qmax * step,
        step,
        0.0,
        "integer" if axis is not None else "value",
    )
