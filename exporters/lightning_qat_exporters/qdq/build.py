"""From the converted model to one QDQ graph, which both ONNX exporters start from.

The translated program gets the very constants of the model. The passes below then give nodes and
initializers the names of layers and put transposes of weights into their integers.
"""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from lightning_qat.export.protocol import Unsupported, UnsupportedByTarget
from lightning_qat.ir.operators import LAYER_TYPES, RECURRENT_TYPES
from lightning_qat.ir.ops import layer_of_weight_key
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat_exporters.onnx_files.graph_writer import array_of, initializer
from lightning_qat_exporters.qdq.gemm_as_matmul import gemm_as_matmul
from lightning_qat_exporters.qdq.global_average_pool import global_average_pools
from lightning_qat_exporters.qdq.grouped_weights import restore_order, stored_form
from lightning_qat_exporters.qdq.translate import KEY, keys_of, translated

ActivationType = Literal["int8", "uint8"]

FULL_GRIDS = ((-128, 127), (-32768, 32767))
"""Grids that are all of their type, so that QuantizeLinear's own saturation is theirs."""

INT4_GRID = IntegerGrid(-8, 7)

OPSET = 20
"""What exporters translate to unless they need another one, so that they share the translation."""


def build_qdq(
    model: QuantizedModel,
    *,
    target: str,
    opset: int,
    activation_type: ActivationType,
    int4_weights: bool = False,
    split_gemms: bool = False,
) -> ir.Model:
    """Translate a converted model to ONNX with explicit quantization.

    Args:
        model: The converted model.
        target: Name of the exporter, for errors.
        opset: 18 or newer; 16-bit activations and ``int4_weights`` need 21.
        activation_type: ``uint8`` moves integers and zero points of 8 and fewer bits up by 128:
            the same real numbers.
        int4_weights: Store weights of 4 bits as INT4 instead of INT8.
        split_gemms: See ``gemm_as_matmul``.

    Returns:
        A model in which every quantized activation is ``QuantizeLinear -> [Clip] ->
        DequantizeLinear`` (``Clip`` below 8 bits), every quantized weight an integer initializer
        behind ``DequantizeLinear``, compute nodes are named by their layer and initializers by
        layer and role.

    Raises:
        UnsupportedByTarget: 16-bit activations below opset 21; all of them are named.
    """
    _refuse_wide_activations(model, target, opset)
    onnx_model = translated(model, opset).clone()
    _give_constants(onnx_model, model, activation_type, int4_weights)
    if split_gemms:
        gemm_as_matmul(onnx_model.graph)
    _transpose_integers(onnx_model.graph)
    global_average_pools(onnx_model.graph)
    _name_nodes(onnx_model.graph)
    _name_biases(onnx_model.graph)
    _name_batch(onnx_model.graph)
    _drop_unused_initializers(onnx_model.graph)
    _describe(onnx_model)
    return onnx_model


def _refuse_wide_activations(model: QuantizedModel, target: str, opset: int) -> None:
    wide = tuple(
        Unsupported(
            key,
            f"16-bit activations need opset 21; got opset {opset}",
            "Use opset=21, or 8-bit activations",
        )
        for key, tensor in model.tensors.items()
        if tensor.qparams.grid.dtype is torch.int16 and opset < 21
    )
    if wide:
        raise UnsupportedByTarget(target, wide)


def _give_constants(
    onnx_model: ir.Model,
    model: QuantizedModel,
    activation_type: ActivationType,
    int4_weights: bool,
) -> None:
    """Give every Q and DQ initializers of its own, named by key; insert Clip below 8 bits."""
    graph = onnx_model.graph
    for node in list(graph):
        keys = keys_of(node.metadata_props)
        if not keys:
            continue
        key = keys[0]
        tensor = model.tensors[key]
        scale = initializer(graph, f"{key}_scale", tensor.qparams.scale.numpy())
        if tensor.integers is not None:
            stored = stored_form(tensor)[0].numpy()
            if int4_weights and tensor.qparams.grid == INT4_GRID:
                stored = stored.astype(ir.DataType.INT4.numpy())
            integers = initializer(graph, key, stored)
            zeros = np.zeros(tuple(tensor.qparams.scale.shape), stored.dtype)
            node.resize_inputs(3)
            node.replace_input_with(0, integers)
            node.replace_input_with(1, scale)
            # Zero is the default, but ONNX Runtime fuses QGemm only where it is written.
            node.replace_input_with(2, initializer(graph, f"{key}_zero_point", zeros))
            restore_order(graph, node, tensor, key)
            continue
        grid, zero_point = tensor.qparams.grid, tensor.qparams.zero_point.numpy()
        wide = grid.dtype is torch.int16
        shift = 128 if activation_type == "uint8" and not wide else 0
        dtype = np.dtype("int16" if wide else activation_type)
        stored_zero_point = initializer(
            graph, f"{key}_zero_point", (zero_point + shift).astype(dtype)
        )
        # The type of the integers is that of the zero point, so both nodes must name it.
        node.resize_inputs(3)
        node.replace_input_with(1, scale)
        node.replace_input_with(2, stored_zero_point)
        # Per tensor: an axis would only mislead.
        node.attributes.pop("axis", None)
        if node.op_type == "QuantizeLinear":
            node.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(dtype))
            if (grid.qmin, grid.qmax) not in FULL_GRIDS:
                _clip(graph, node, key, dtype, grid.qmin + shift, grid.qmax + shift)


def _clip(
    graph: ir.Graph, quantize: ir.Node, key: str, dtype: np.dtype[Any], low: int, high: int
) -> None:
    bounds = [
        initializer(graph, f"{key}_{name}", np.array(value, dtype))
        for name, value in (("qmin", low), ("qmax", high))
    ]
    users = list(quantize.outputs[0].uses())
    clip = ir.Node("", "Clip", [quantize.outputs[0], *bounds], name=f"{key}.Clip")
    clip.metadata_props[KEY] = quantize.metadata_props[KEY]
    # A recurrent layer quantizes by one key at every step; values are told apart by their names.
    clip.outputs[0].name = f"{quantize.outputs[0].name}.clipped"
    clip.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(dtype))
    clip.outputs[0].shape = quantize.outputs[0].shape
    for user, index in users:
        user.replace_input_with(index, clip.outputs[0])
    graph.insert_after(quantize, clip)


def _transpose_integers(graph: ir.Graph) -> None:
    """``DequantizeLinear -> Transpose`` of a weight becomes a DequantizeLinear of the transpose."""
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        producer = source.producer() if source is not None else None
        if producer is None or producer.op_type != "DequantizeLinear":
            continue
        key = producer.metadata_props.get(KEY)
        integers, scale = array_of(producer.inputs[0]), array_of(producer.inputs[1])
        if key is None or integers is None or scale is None:
            continue
        order = list(node.attributes.get_ints("perm", range(integers.ndim)[::-1]))
        transposed = initializer(graph, f"{key}_transposed", integers.transpose(order))
        attributes = []
        if scale.ndim:
            axis = producer.attributes.get_int("axis", 1)
            attributes.append(ir.AttrInt64("axis", order.index(axis)))
        new = ir.Node("", "DequantizeLinear", [transposed, *producer.inputs[1:]], attributes)
        new.metadata_props.update(producer.metadata_props)
        new.outputs[0].name = f"{key}.real"
        new.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        new.outputs[0].shape = node.outputs[0].shape
        graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with(node.outputs[0], new.outputs[0])
        graph.remove(node, safe=True)
        if not producer.outputs[0].uses():
            graph.remove(producer, safe=True)


def _name_nodes(graph: ir.Graph) -> None:
    """Compute nodes are named by their layer, all others by the module that made them."""
    taken: Counter[str] = Counter()

    def fresh(name: str) -> str:
        taken[name] += 1
        return name if taken[name] == 1 else f"{name}_{taken[name] - 1}"

    for node in graph:
        layer = layer_of(node)
        if layer is not None:
            node.name = fresh(layer)
    for node in graph:
        if layer_of(node) is not None:
            continue
        keys = keys_of(node.metadata_props)
        if keys:
            node.name = fresh(f"{keys[0]}.{node.op_type}")
        else:
            path = module_of(node)
            node.name = (
                fresh(path) if path and path not in taken else fresh(f"{path}/{node.op_type}")
            )


def layer_of(node: ir.Node) -> str | None:
    """The layer that a compute node belongs to, from the key of its weight."""
    if node.op_type not in (*LAYER_TYPES, *RECURRENT_TYPES) or len(node.inputs) < 2:
        return None
    for value in node.inputs[:2]:
        producer = value.producer() if value is not None else None
        while (
            node.op_type == "ConvTranspose"
            and producer is not None
            and producer.op_type in ("Reshape", "Transpose")
        ):
            source = producer.inputs[0]
            producer = source.producer() if source is not None else None
        if producer is not None and producer.op_type == "DequantizeLinear":
            key = producer.metadata_props.get(KEY, "")
            if "weight" in key.rpartition(".")[2]:
                return layer_of_weight_key(key) or "layer"
    return None


def module_of(node: ir.Node) -> str:
    """The dotted path of the module whose forward made a node; empty for the root."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
    names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    # What torch writes for nodes that its own passes made.
    names = [name for name in names if not name.startswith("_empty_nn_module_stack")]
    return names[-2] if len(names) > 1 else ""


def _name_biases(graph: ir.Graph) -> None:
    for node in list(graph):
        layer = layer_of(node)
        if layer is None or node.op_type in RECURRENT_TYPES:
            continue
        holder, index = node, 2
        if node.op_type == "MatMul":
            users = [usage.node for usage in node.outputs[0].uses()]
            if len(users) != 1 or users[0].op_type != "Add":
                continue
            holder, index = users[0], 1 - users[0].inputs.index(node.outputs[0])
        bias = array_of(holder.inputs[index]) if len(holder.inputs) > index else None
        if bias is not None:
            holder.replace_input_with(index, initializer(graph, f"{node.name}.bias", bias))


def _name_batch(graph: ir.Graph) -> None:
    """Call the batch dimension ``batch`` instead of torch's symbol."""
    # First, or second, as recurrent layers may have it; later sizes are no batch.
    symbols = [
        dim.value
        for axis in (0, 1)
        for value in graph.inputs
        for dim in list(value.shape or ())[axis : axis + 1]
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    ]
    if not symbols:
        return
    symbol = symbols[0]
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        for index, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and value.shape:
                # s77 alone or in an expression such as 4*s77.
                renamed = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dim.value)
                value.shape[index] = ir.SymbolicDim(renamed)


def _drop_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _describe(onnx_model: ir.Model) -> None:
    """Keep names, drop what torch.onnx notes about the machine that exported."""
    graph = onnx_model.graph
    onnx_model.producer_name = "lightning-qat"
    onnx_model.producer_version = version("lightning-qat")
    onnx_model.metadata_props.clear()
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph:
        key = node.metadata_props.get(KEY)
        node.metadata_props.clear()
        node.doc_string = None
        if key is not None:
            node.metadata_props[KEY] = key
        for output in node.outputs:
            output.metadata_props.clear()
