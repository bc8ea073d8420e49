"""Write LSTM and GRU of a QDQ model as the device nodes that Huawei AMCT writes for them.

An ONNX ``LSTM`` or ``GRU`` whose input, initial hidden state and weights are all quantized becomes
``BasicLSTMInplaceFillWindowCache`` or ``BasicGRUInplaceFillWindowCache``. Names, attributes and
numbers are those of files that AMCT wrote. Best effort: Huawei's documents list the nodes for no
current product, and their kernels for sequences of one step.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from lightning_qat_exporters.cann.int4_packing import RNN_INPUT_AXIS, pack
from lightning_qat_exporters.cann.qdq_graph.names import reader_label
from lightning_qat_exporters.cann.qdq_graph.recurrent import by_row
from lightning_qat_exporters.cann.qdq_graph.types import (
    IntegerRecurrent,
    QuantizedActivation,
    QuantizedGraph,
)
from lightning_qat_exporters.onnx_files.graph_writer import Names, initializer


def device_op_type(layer: IntegerRecurrent) -> str:
    """The device node's operator."""
    return f"Basic{layer.node.op_type}InplaceFillWindowCache"


def device_note(layer: IntegerRecurrent) -> str:
    """What a user of the file must know about a device node."""
    length = "one whose length is not fixed" if layer.steps is None else f"one of {layer.steps}"
    remarks = [
        f"{layer.name!r}: written as {device_op_type(layer)}, best effort: no current product "
        "supports it by Huawei's documents, and kernels require a sequence length of 1; this is "
        f"{length}."
    ]
    if layer.steps != 1:
        remarks.append(
            "Runtimes of the deploy model round the hidden state, as AMCT's simulation, before the "
            "first step only; the fake-quant model computes what was trained."
        )
    if layer.x.offset_d or layer.h.offset_d:
        remarks.append(
            f"AMCT's own files have offsets of 0 here; these are {layer.x.offset_d} and "
            f"{layer.h.offset_d} (a symmetric activation in the recipe gives 0)."
        )
    return " ".join(remarks)


def write_device_nodes(found: QuantizedGraph) -> QuantizedGraph:
    """Replace every ``found.recurrent`` by its device node, in the graph of ``found``.

    Returns:
        What is quantized afterwards: without the pairs that only these layers read.
    """
    if not found.recurrent:
        return found
    for layer in found.recurrent:
        _write_device_node(found.model.graph, layer)
    common.RemoveUnusedNodesPass()(found.model)
    return _without_removed_pairs(found)


def round_recurrent_biases(found: QuantizedGraph) -> None:
    """Give every ``found.recurrent`` the real values of the device node's integer biases."""
    for layer in found.recurrent:
        if layer.bias is not None:
            rows = layer.bias.size // 2
            scales = [by_row(scale, rows) for scale in np.split(layer.accumulator_scale, 2)]
            real = layer.bias.astype(np.float32) * np.concatenate(scales)
            bias = initializer(found.model.graph, f"{layer.name}.bias", real)
            layer.node.replace_input_with(3, bias)


def _without_removed_pairs(found: QuantizedGraph) -> QuantizedGraph:
    """Activations with the pairs that are still in the graph, named by their remaining readers.

    What the pairs read may be the output of a device node by now.
    """
    first_layer: dict[QuantizedActivation, str] = {}
    for layer in found.layers:
        first_layer.setdefault(layer.activation, layer.name)
    names = Names()
    left: dict[QuantizedActivation, QuantizedActivation] = {}
    for activation in found.activations:
        quantizes = tuple(n for n in activation.quantizes if n.graph is not None)
        dequantizes = tuple(n for n in activation.dequantizes if n.graph is not None)
        source = quantizes[0].inputs[0] if quantizes else None
        if source is not None:
            name = first_layer.get(activation) or reader_label(quantizes, dequantizes)
            left[activation] = replace(
                activation,
                name=names.take(name),
                source=source,
                quantizes=quantizes,
                dequantizes=dequantizes,
            )
    layers = (replace(layer, activation=left[layer.activation]) for layer in found.layers)
    return replace(found, activations=tuple(left.values()), layers=tuple(layers), recurrent=())


def _write_device_node(graph: ir.Graph, layer: IntegerRecurrent) -> None:
    node = layer.node
    hidden = layer.recurrent.shape[2]
    attributes = {
        "hidden_size": hidden,
        **({"input_forget": 0} if node.op_type == "LSTM" else {"linear_before_reset": 1}),
        "direction": "forward",
        "clip": -1.0,
        "quant_scale_x": float(np.float32(1) / layer.x.scale_d),
        "quant_offset_x": float(layer.x.offset_d),
        "quant_scale_h": float(np.float32(1) / layer.h.scale_d),
        "quant_offset_h": float(layer.h.offset_d),
        "quant_sqrt_mode_x": 0,
        "quant_sqrt_mode_h": 0,
        # INT8 in CANN's numbering of types.
        "quant_dtype": 2,
    }
    empty = [
        ir.AttrStrings("activations", []),
        ir.AttrFloat32s("activation_alpha", []),
        ir.AttrFloat32s("activation_beta", []),
    ]
    name = layer.name
    param = layer.accumulator_scale.view(np.uint32).astype(np.uint64)
    packed = layer.wts_type == "INT4"
    constants = {
        "weight": pack(layer.weight, RNN_INPUT_AXIS) if packed else layer.weight,
        "recurrent": pack(layer.recurrent, RNN_INPUT_AXIS) if packed else layer.recurrent,
        "bias": layer.bias,
        "dequant.param": param,
    }
    weight, recurrent, bias, scale = (
        None if array is None else initializer(graph, f"{name}.{key}", array)
        for key, array in constants.items()
    )
    cell = [node.inputs[6]] if node.op_type == "LSTM" else []
    new = ir.Node(
        "",
        device_op_type(layer),
        [layer.x.source, weight, recurrent, layer.h.source, *cell, bias, None, None, scale],
        [*ir.convenience.convert_attributes(attributes), *empty],
        num_outputs=3 if node.op_type == "LSTM" else 2,
        name=name,
    )
    for number, made in enumerate(new.outputs):
        made.name = f"{name}.output{number}"
        made.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(node, new)
    for old, made in zip(node.outputs, new.outputs, strict=False):
        made.shape = old.shape
        made.name, old.name = old.name or made.name, None
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
