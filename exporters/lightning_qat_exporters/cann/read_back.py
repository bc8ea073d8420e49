"""Read the numbers of a deploy model back and compare them with the converted model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from lightning_qat.export.protocol import Array
from lightning_qat.ir.quantized_model import QuantizedLayer, QuantizedModel
from lightning_qat.ir.recurrence import Recurrence
from lightning_qat.numerics.arithmetic import accumulator_scale, quantize_bias
from lightning_qat_exporters.cann.deploy_file import RNN_OPS
from lightning_qat_exporters.cann.int4_packing import INPUT_AXIS, RNN_INPUT_AXIS, unpacked
from lightning_qat_exporters.onnx_files.read import load_with_data
from lightning_qat_exporters.qdq.recurrent import in_onnx_order


def deploy_differences(model: QuantizedModel, path: Path) -> tuple[str, ...]:
    """Every number of a deploy file that is not the converted model's, in words.

    Expected are ``float32(1) / scale`` and the zero point in AscendQuant, the integers of the
    weight (transposed for Gemm and MatMul), the bits of ``float32(scale_in * scale_w)`` in the
    dequant parameter, and ``round(bias / (scale_in * scale_w))`` in the bias, or the bias itself
    where it is added in float; the same in the nodes of recurrent layers.

    Args:
        model: What the file was made of.
        path: The deploy model.
    """
    proto = load_with_data(path)
    arrays = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    made_by = {output: node for node in proto.graph.node for output in node.output}
    read_by = {node.input[0]: node for node in proto.graph.node if node.op_type == "AscendDequant"}
    nodes = {node.name: node for node in proto.graph.node}
    found: list[str] = []
    seen: dict[str, int] = {}
    fused = {node.name: node for node in proto.graph.node if node.op_type in RNN_OPS}
    for call in model.recurrences:
        if call.name in fused:
            found += _recurrent_differences(model, call, fused[call.name], arrays)
    for layer in model.layers:
        if layer.name in fused:
            continue
        repeated = seen.setdefault(layer.name, 0)
        seen[layer.name] += 1
        name = f"{layer.name}_{repeated}" if repeated else layer.name
        node = nodes.get(name)
        quant = made_by.get(node.input[0]) if node is not None else None
        dequant = read_by.get(node.output[0]) if node is not None else None
        if node is None or quant is None or dequant is None or quant.op_type != "AscendQuant":
            found.append(f"{name}: the file has no quantized layer of that name")
            continue
        found += _layer_differences(model, layer, name, node, quant, arrays, dequant.input[1])
    return tuple(found)


def _layer_differences(
    model: QuantizedModel,
    layer: QuantizedLayer,
    name: str,
    node: onnx.NodeProto,
    quant: onnx.NodeProto,
    arrays: dict[str, Array],
    param: str,
) -> list[str]:
    source, weight = model.tensors[layer.input_key], model.tensors[layer.weight_key]
    scale, offset = source.qparams.scale, source.qparams.zero_point
    integers = weight.integers
    assert integers is not None
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in quant.attribute}
    transposed = node.op_type in ("Gemm", "MatMul")
    expected = integers.T.numpy() if transposed else integers.numpy()
    axis = INPUT_AXIS[node.op_type]
    stored = unpacked(arrays[node.input[1]], axis, expected.shape[axis])
    channels = weight.qparams.scale.numel()
    if node.op_type == "ConvTranspose" and channels > 1:
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        channels = integers.shape[1] * groups
    product = accumulator_scale(scale, weight.qparams.scale, channels).numpy()
    pairs: dict[str, tuple[Any, Any]] = {
        "AscendQuant scale": (np.float32(attributes["scale"]), np.float32(1) / scale.numpy()),
        "AscendQuant offset": (attributes["offset"], offset.numpy()),
        "weight": (stored, expected),
        "dequant parameter": (arrays[param], product.view(np.uint32).astype(np.uint64)),
    }
    if layer.bias is not None and len(node.input) > 2:
        bias = quantize_bias(layer.bias, scale, weight.qparams.scale)
        pairs["bias"] = (arrays[node.input[2]], bias.numpy())
    elif layer.bias is not None and layer.bias.any():  # zeros are left out
        added = arrays.get(f"{name}.bias", np.empty(0))
        pairs["float bias"] = (added.reshape(-1), layer.bias.numpy())
    return _told(name, pairs)


def _recurrent_differences(
    model: QuantizedModel, call: Recurrence, node: onnx.NodeProto, arrays: dict[str, Array]
) -> list[str]:
    """As above for a device node: rows in ONNX's order of gates, input before hidden state."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    pairs: dict[str, tuple[Any, Any]] = {}
    params, biases = [], []
    layers = {layer.weight_key: layer for layer in model.layers if layer.name == call.name}
    for index, (part, letter) in enumerate((("ih", "x"), ("hh", "h")), start=1):
        layer = layers[call.key(f"weight_{part}_l0")]
        source, weight = model.tensors[layer.input_key], model.tensors[layer.weight_key]
        integers, scale = weight.integers, source.qparams.scale
        assert integers is not None
        rows = in_onnx_order(call.kind, integers)
        expected = rows[None].numpy()
        stored = unpacked(arrays[node.input[index]], RNN_INPUT_AXIS, expected.shape[-1])
        pairs[f"weight_{part}"] = stored, expected
        step = np.float32(attributes[f"quant_scale_{letter}"])
        pairs[f"quant_scale_{letter}"] = step, np.float32(1) / scale.numpy()
        offset = attributes[f"quant_offset_{letter}"]
        pairs[f"quant_offset_{letter}"] = offset, source.qparams.zero_point.numpy()
        products = accumulator_scale(scale, weight.qparams.scale, len(rows))
        params.append(in_onnx_order(call.kind, products))
        if layer.bias is not None:
            bias = quantize_bias(layer.bias, scale, weight.qparams.scale)
            biases.append(in_onnx_order(call.kind, bias))
    bits = torch.cat(params).numpy().view(np.uint32).astype(np.uint64)
    written = arrays[node.input[-1]]
    pairs["dequant parameter"] = np.repeat(written, bits.size // written.size), bits
    if biases:
        pairs["bias"] = arrays[node.input[-4]], torch.cat(biases)[None].numpy()
    return _told(call.name, pairs)


def _told(name: str, pairs: dict[str, tuple[Any, Any]]) -> list[str]:
    return [
        f"{name}: {what} must be {_shown(wanted)}; the file has {_shown(found)}"
        for what, (found, wanted) in pairs.items()
        if not np.array_equal(found, wanted)
    ]


def _shown(values: Any) -> str:
    flat = np.asarray(values).reshape(-1)
    shown = ", ".join(str(v) for v in flat[:4])
    return f"[{shown}, ...] ({flat.size} values)" if flat.size > 4 else shown
