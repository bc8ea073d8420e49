"""Rules on the layers that compute on integers: weights, biases, accumulators, neighbours."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from lightning_qat.export.lint import Finding
from lightning_qat_exporters.cann.deploy_file import DeployFile, attributes, name_of

_EXACT_IN_FLOAT32 = 2**24
_INT32 = np.iinfo(np.int32)
_FEW_CHANNELS = 16


def layer_findings(file: DeployFile) -> Iterator[Finding]:
    """What the integer layers of a file break."""
    by_channel = []
    for node in file.nodes:
        if file.is_integer_layer(node):
            yield from _neighbours(file, node)
            yield from _form(node)
            yield from _weight(file, node)
            if node.op_type in ("Gemm", "MatMul") and _scales(file, node) > 1:
                by_channel.append(name_of(node))
    if by_channel:
        yield Finding(
            "advice",
            by_channel[0],
            "Huawei's guide for converted models shows one scale for the weight of a Gemm or "
            "MatMul; AscendDequant is registered with one per channel, too",
            f"one scale per channel in {len(by_channel)} layers",
            "If ATC refuses them, train with overrides={'type:Linear': {'weight': "
            "{'granularity': 'per_tensor'}}}",
        )


def _scales(file: DeployFile, layer: onnx.NodeProto) -> int:
    """How many numbers the dequant parameter of a layer has; 0 where it has none."""
    for reader in file.readers.get(layer.output[0], []):
        if reader.op_type == "AscendDequant" and len(reader.input) > 1:
            param = file.array(reader.input[1])
            return 0 if param is None else int(param.size)
    return 0


def _neighbours(file: DeployFile, node: onnx.NodeProto) -> Iterator[Finding]:
    if file.quant_before(node) is None:
        before = file.maker.get(node.input[0])
        yield Finding(
            "error",
            name_of(node),
            "a layer with int8 weights must read an AscendQuant",
            f"input {node.input[0]!r}" + (f" of {before.op_type}" if before is not None else ""),
            "Put an AscendQuant before the layer, or store real weights",
        )
    readers = file.readers.get(node.output[0], [])
    others = [r.op_type for r in readers if r.op_type != "AscendDequant"]
    if others or not readers or node.output[0] in file.outputs:
        yield Finding(
            "error",
            name_of(node),
            "an accumulator must be read by AscendDequant alone",
            ", ".join(others) or ("nothing" if not readers else "a graph output"),
            "Put an AscendDequant after the layer",
        )


def _form(node: onnx.NodeProto) -> Iterator[Finding]:
    values = attributes(node)
    if node.op_type == "Gemm":
        wanted = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
        defaults = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
        got = {key: values.get(key, defaults[key]) for key in wanted}
        if got != wanted:
            yield Finding(
                "error",
                name_of(node),
                "an integer Gemm must have transA = transB = 0 and alpha = beta = 1",
                ", ".join(f"{k} = {v}" for k, v in got.items() if v != wanted[k]),
                "Store the weight as [in, out]",
            )
    if len(values.get("dilations", ())) == 3 and values["dilations"][0] != 1:
        yield Finding(
            "error",
            name_of(node),
            "an integer convolution of three dimensions must have dilation 1 along the first",
            f"dilations {list(values['dilations'])}",
            "Leave the layer float",
        )


def _weight(file: DeployFile, node: onnx.NodeProto) -> Iterator[Finding]:
    tensor = file.tensor(node.input[1])
    if tensor is None or tensor.data_type != onnx.TensorProto.INT8:
        got = "no initializer" if tensor is None else _type_name(tensor)
        yield Finding(
            "error",
            name_of(node),
            "the weight must be an int8 initializer",
            got,
            "Store the weight's integers, or remove the AscendQuant before the layer",
        )
        return
    weight = file.array(node.input[1])
    assert weight is not None  # the tensor is there
    wrong = _wrong_shape(node, weight.shape)
    if wrong:
        yield Finding(
            "error",
            name_of(node),
            f"the weight of an integer {node.op_type} must have {wrong}",
            f"shape {list(weight.shape)}",
            "Store the weight in the layer's own layout",
        )
        return
    packed = yield from _channels_in(file, node, weight)
    bias = yield from _bias(file, node)
    if not packed:
        yield from _accumulator(file, node, weight, bias)


def _wrong_shape(node: onnx.NodeProto, shape: tuple[int, ...]) -> str:
    """What a weight must have that one of this shape has not; the other rules count on it."""
    if node.op_type in ("Gemm", "MatMul"):
        return "two axes, none of them empty" if len(shape) != 2 or 0 in shape else ""
    if len(shape) < 3 or 0 in shape:
        return "the channels and each dimension of the kernel as axes, none of them empty"
    groups = int(attributes(node).get("group", 1))
    if groups < 1 or shape[0] % groups:
        return f"equal parts along its first axis for each of {groups} groups"
    return ""


def _channels_in(
    file: DeployFile, node: onnx.NodeProto, weight: NDArray[Any]
) -> Generator[Finding, None, bool]:
    """Rules on input channels; the value is whether two weights share a byte (INT4)."""
    quant = file.quant_before(node)
    shape = file.shapes.get(quant.input[0], ()) if quant is not None else ()
    convolution = node.op_type in ("Conv", "ConvTranspose")
    groups = int(attributes(node).get("group", 1))
    stored = weight.shape[1] * groups if node.op_type == "Conv" else weight.shape[0]
    known = shape[1 if convolution else -1] if len(shape) > 1 else None
    channels = stored if known is None else known
    if channels <= _FEW_CHANNELS and convolution and groups == 1:
        yield Finding(
            "advice",
            name_of(node),
            f"integer layers gain little below {_FEW_CHANNELS + 1} input channels, which the "
            "device fills up with zeros",
            f"{channels} input channels",
            "Consider leaving the layer float; the first one often is",
        )
    if known is None or known == stored:
        return False
    if known not in (2 * stored, 2 * stored - 1):
        yield Finding(
            "error",
            name_of(node),
            f"the weight must be for the {known} channels of the input",
            f"a weight for {stored}",
            "Store the weight in the layer's own layout",
        )
        return True
    if known % 2 or groups > 1:
        yield Finding(
            "error",
            name_of(node),
            "weights packed as INT4, two to a byte, must have an even number of input channels "
            "and one group",
            f"{known} channels in {groups} group{'s' if groups > 1 else ''}",
            "Store this layer's weight as INT8",
        )
    else:
        yield Finding(
            "warning",
            name_of(node),
            "weights packed as INT4 must be named so in the record (wts_type); nothing in the "
            "model says it",
            f"a weight for {stored} of {known} input channels",
            "Give ATC the record, and look your product up for INT4",
        )
    return True


def _bias(file: DeployFile, node: onnx.NodeProto) -> Generator[Finding, None, NDArray[Any] | None]:
    """Rules on the bias; the value is its integers where they can be used further."""
    if len(node.input) < 3 or not node.input[2]:
        return None
    tensor = file.tensor(node.input[2])
    channels = file.channels(node)
    if tensor is None or tensor.data_type != onnx.TensorProto.INT32:
        yield Finding(
            "error",
            name_of(node),
            "the bias must be an int32 initializer",
            "no initializer" if tensor is None else _type_name(tensor),
            "Store round(bias / (scale_d * scale_w)), or add the real bias after AscendDequant",
        )
        return None
    if list(tensor.dims) != [channels]:
        yield Finding(
            "error",
            name_of(node),
            f"the bias must have one number per output channel ({channels})",
            f"shape {list(tensor.dims)}",
            "Store one number per channel",
        )
        return None
    return file.array(node.input[2])


def _accumulator(
    file: DeployFile, node: onnx.NodeProto, weight: NDArray[Any], bias: NDArray[Any] | None
) -> Iterator[Finding]:
    """The largest sum that data of any value can give, per output channel."""
    quant = file.quant_before(node)
    values = {} if quant is None else attributes(quant)
    if values.get("dst_type") != "INT8":
        return  # the width of a device's accumulator for 16-bit data is not known
    offset = values.get("offset", 0.0)
    rows = _per_channel(node, weight)
    positive = np.where(rows > 0, rows, 0).sum(1, dtype=np.int64)
    negative = rows.sum(1, dtype=np.int64) - positive
    added = np.zeros(len(rows)) if bias is None else bias.astype(np.float64)
    low, high = -128 - offset, 127 - offset
    largest = np.maximum(
        np.abs(positive * high + negative * low + added),
        np.abs(positive * low + negative * high + added),
    )
    folded = added - offset * (positive + negative)
    worst = int(largest.argmax())
    if np.abs(folded).max(initial=0) > _INT32.max:
        at = int(np.abs(folded).argmax())
        yield Finding(
            "error",
            name_of(node),
            "the bias must fit int32 after ATC has folded the offset in: bias - offset * sum(w)",
            f"{folded[at]:.0f} in channel {at}",
            "Widen the range of the layer's input or weight, or keep the bias float",
        )
    elif largest[worst] > _INT32.max:
        yield Finding(
            "error",
            name_of(node),
            "an accumulator must stay below 2**31 whatever the data",
            f"up to {largest[worst]:.0f} in channel {worst}",
            "Use fewer bits for the weight, or split the layer",
        )
    elif largest[worst] >= _EXACT_IN_FLOAT32:
        yield Finding(
            "advice",
            name_of(node),
            "the fake-quant model is exact while accumulators stay below 2**24",
            f"up to {largest[worst]:.0f} in channel {worst}",
            "Nothing for the device; compare with the reference executor instead",
        )


def _per_channel(node: onnx.NodeProto, weight: NDArray[Any]) -> NDArray[Any]:
    """The weights of each output channel; of a transposed convolution those of all positions."""
    if node.op_type == "Conv":
        return weight.reshape(weight.shape[0], -1)
    if node.op_type == "ConvTranspose":
        groups = int(attributes(node).get("group", 1))
        grouped = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
        return grouped.reshape(groups * weight.shape[1], -1)
    return weight.T


def _type_name(tensor: onnx.TensorProto) -> str:
    return str(onnx.TensorProto.DataType.Name(tensor.data_type))
