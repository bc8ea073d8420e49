"""Rules on the nodes between real and integer: AscendQuant, AscendDequant, AscendAntiQuant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from lightning_qat.export.lint import Finding
from lightning_qat_exporters.cann.deploy_file import DeployFile, attributes, name_of, scales_of

_TYPES = {"INT8": (-128, 127), "INT16": (-32768, 32767), "INT4": (-8, 7)}
_ROUND_MODES = ("Round", "Floor", "Ceil", "Trunc")
_FLOAT16 = np.finfo(np.float16)
# A step of 100 is a range of 25,500: more than any image or activation we know of.
_LARGEST_LIKELY_STEP = 100.0


def quant_findings(file: DeployFile) -> Iterator[Finding]:
    """What the nodes between real and integer break."""
    for node in file.nodes:
        if node.op_type == "AscendQuant":
            yield from _quant(file, node)
        elif node.op_type == "AscendAntiQuant":
            yield from _antiquant(file, node)
        elif node.op_type == "AscendDequant":
            yield from _dequant(file, node)


def _quant(file: DeployFile, node: onnx.NodeProto) -> Iterator[Finding]:
    name, values = name_of(node), attributes(node)
    yield from _scale_attribute(node)
    yield from _sqrt_mode(node)
    scale = values.get("scale")
    if isinstance(scale, float) and 0 < scale < 1 / _LARGEST_LIKELY_STEP:
        yield Finding(
            "warning",
            name,
            "scale must be the reciprocal of the step, 1/scale_d",
            f"{scale:.6g}, a step of {1 / scale:.6g}",
            f"If {scale:.6g} is scale_d itself, write {1 / scale:.6g}",
        )
    dst_type = values.get("dst_type")
    if dst_type not in _TYPES:
        yield Finding(
            "error",
            name,
            f"dst_type must be a string, one of {list(_TYPES)}",
            "none" if dst_type is None else repr(dst_type),
            "Write dst_type 'INT8'",
        )
    else:
        yield from _offset(node, *_TYPES[dst_type])
    if dst_type == "INT16":
        yield Finding(
            "error",
            name,
            "AscendQuant is registered for int8 and int4 (ops-nn, ascend_quant_proto.h)",
            "dst_type 'INT16', which AMCT writes and the parser reads",
            "Use 8 bits unless your product is known to take INT16",
        )
    if values.get("round_mode", "Round") not in _ROUND_MODES:
        yield Finding(
            "error",
            name,
            f"round_mode must be one of {list(_ROUND_MODES)}",
            repr(values["round_mode"]),
            "Leave the attribute out; the default rounds half to even",
        )
    for reader in file.readers.get(node.output[0], []):
        if reader.op_type != "AscendAntiQuant" and not file.is_integer_layer(reader):
            yield Finding(
                "error",
                name_of(reader),
                "integers must be read by a layer with integer weights or by AscendAntiQuant",
                f"{reader.op_type} reads {node.output[0]!r}",
                "Put an AscendAntiQuant before the node",
            )


def _antiquant(file: DeployFile, node: onnx.NodeProto) -> Iterator[Finding]:
    name, values = name_of(node), attributes(node)
    yield from _scale_attribute(node)
    yield from _sqrt_mode(node)
    quant = file.quant_before(node)
    if quant is None:
        yield Finding(
            "error",
            name,
            "AscendAntiQuant must read what an AscendQuant gives",
            repr(node.input[0]),
            "Quantize the tensor first, or drop the node",
        )
        return
    before = attributes(quant)
    scale, reciprocal = values.get("scale"), before.get("scale")
    if isinstance(scale, float) and isinstance(reciprocal, float):
        product = (scale * reciprocal) ** (1 + int(bool(before.get("sqrt_mode", 0))))
        if not 0.99 < product < 1.01:
            yield Finding(
                "error",
                name,
                "AscendAntiQuant has scale_d and the AscendQuant before it 1/scale_d",
                f"{scale:.6g} here and {reciprocal:.6g} in {name_of(quant)!r}",
                "Write scale_d here and its reciprocal there",
            )
    if values.get("offset", 0.0) != before.get("offset", 0.0):
        yield Finding(
            "error",
            name,
            "AscendAntiQuant must have the offset of the AscendQuant before it, with its sign",
            f"{values.get('offset', 0.0)} here and {before.get('offset', 0.0)} there",
            "Write the same offset; ATC's parser negates it",
        )


def _dequant(file: DeployFile, node: onnx.NodeProto) -> Iterator[Finding]:
    name, values = name_of(node), attributes(node)
    layer = file.maker.get(node.input[0])
    if layer is None or not file.is_integer_layer(layer):
        yield Finding(
            "error",
            name,
            "AscendDequant must read the accumulator of a layer with integer weights",
            repr(node.input[0]) if layer is None else f"{layer.op_type} {name_of(layer)!r}",
            "Remove the node, or use AscendAntiQuant after an AscendQuant",
        )
        layer = None
    yield from _sqrt_mode(node)
    for attribute in ("dtype", "relu_flag"):
        if values.get(attribute, 0) not in (0, 1):
            yield Finding(
                "error",
                name,
                f"{attribute} must be 0 or 1",
                repr(values[attribute]),
                "dtype 0 is float32, 1 float16; relu_flag 1 clamps at 0",
            )
    yield from _parameter(file, node, layer)


def _parameter(
    file: DeployFile, node: onnx.NodeProto, layer: onnx.NodeProto | None
) -> Iterator[Finding]:
    name = node.input[1] if len(node.input) > 1 else name_of(node)
    tensor = file.tensor(name)
    if tensor is None:
        yield Finding(
            "error",
            name_of(node),
            "the dequant parameter must be an initializer",
            "none" if len(node.input) < 2 else f"{name!r}, which is computed or missing",
            "Store uint64(bits of float32(scale_d * scale_w)) as an initializer",
        )
        return
    if tensor.data_type != onnx.TensorProto.UINT64:
        yield Finding(
            "error",
            name,
            "the dequant parameter must be uint64",
            onnx.TensorProto.DataType.Name(tensor.data_type),
            "Store the bits of float32(scale_d * scale_w) in the low half of a uint64",
        )
        return
    param = file.array(name)
    assert param is not None  # the tensor is there
    channels = None if layer is None else file.channels(layer)
    lengths = [1] if channels is None else sorted({1, channels})
    if param.ndim != 1 or (channels is not None and param.size not in lengths):
        yield Finding(
            "error",
            name,
            f"the dequant parameter must be 1-D of length {' or '.join(map(str, lengths))}",
            f"shape {list(param.shape)}",
            "Store one number for the tensor or one per output channel",
        )
    if (param >> np.uint64(32)).any():
        yield Finding(
            "error",
            name,
            "the high 32 bits of the dequant parameter must be zero",
            f"{int(param[(param >> np.uint64(32)) > 0].flat[0]):#x}",
            "Store offsets in AscendQuant; weights have none",
        )
    scales = scales_of(param).ravel()
    smallest = np.finfo(np.float32).tiny
    if not (np.isfinite(scales) & (scales >= smallest)).all():
        bad = scales[~(np.isfinite(scales) & (scales >= smallest))].flat[0]
        yield Finding(
            "error",
            name,
            "scale_d * scale_w must be positive normal float32",
            f"{bad}",
            "Quantize the layer again, or leave it float",
        )
    else:
        yield from _float16(name, node, scales)


def _scale_attribute(node: onnx.NodeProto) -> Iterator[Finding]:
    stored = {a.name: a for a in node.attribute}.get("scale")
    wanted = "1/scale_d" if node.op_type == "AscendQuant" else "scale_d"
    if stored is None or stored.type != onnx.AttributeProto.FLOAT:
        kind = "none" if stored is None else onnx.AttributeProto.AttributeType.Name(stored.type)
        yield Finding(
            "error",
            name_of(node),
            "scale must be there and a FLOAT; without it CANN's parser takes 0.0",
            kind,
            f"Write scale as FLOAT: {wanted}",
        )
    elif not (np.isfinite(stored.f) and stored.f >= np.finfo(np.float32).tiny):
        yield Finding(
            "error",
            name_of(node),
            "scale must be positive normal float32",
            f"{stored.f}",
            f"Write {wanted}",
        )
    else:
        yield from _float16(name_of(node), node, np.array([stored.f], np.float32))


def _offset(node: onnx.NodeProto, low: int, high: int) -> Iterator[Finding]:
    stored = {a.name: a for a in node.attribute}.get("offset")
    if stored is None:
        return
    value: Any = onnx.helper.get_attribute_value(stored)
    is_float = stored.type == onnx.AttributeProto.FLOAT
    if not is_float or value != np.rint(value) or not low <= value <= high:
        yield Finding(
            "error",
            name_of(node),
            f"offset must be a FLOAT that holds an integer from {low} to {high}",
            f"{value!r}",
            "Write the integer that stands for real zero",
        )


def _sqrt_mode(node: onnx.NodeProto) -> Iterator[Finding]:
    mode = attributes(node).get("sqrt_mode", 0)
    if mode not in (0, 1):
        yield Finding(
            "error", name_of(node), "sqrt_mode must be 0 or 1", repr(mode), "Leave it out"
        )


def _float16(
    name: str, node: onnx.NodeProto, scales: Sequence[float] | NDArray[np.float32]
) -> Iterator[Finding]:
    """Many kernels hold scales in float16; ``sqrt_mode`` multiplies by the root twice."""
    outside = [float(s) for s in scales if not _FLOAT16.tiny <= s <= _FLOAT16.max]
    if outside and not attributes(node).get("sqrt_mode", 0):
        root = outside[0] ** 0.5
        yield Finding(
            "advice" if node.op_type == "AscendDequant" else "warning",
            name,
            f"scales should be normal float16, {float(_FLOAT16.tiny):.3g} to "
            f"{float(_FLOAT16.max):.5g}; kernels that compute in float16 lose the others",
            f"{outside[0]:.6g}" + (f" and {len(outside) - 1} more" if outside[1:] else ""),
            f"On such products set sqrt_mode 1 and store square roots ({root:.6g}), or leave the "
            "layer float",
        )
