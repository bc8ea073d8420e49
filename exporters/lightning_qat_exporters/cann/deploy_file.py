"""A deploy model as its rules see it: nodes by what they make and read, constants, shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from lightning_qat.ir.operators import LAYER_TYPES
from lightning_qat_exporters.onnx_files.other_domains import named_by_domain

RNN_OPS = ("BasicLSTMInplaceFillWindowCache", "BasicGRUInplaceFillWindowCache")

_INPUTS: Mapping[str, range] = {
    "AscendQuant": range(1, 2),
    "AscendAntiQuant": range(1, 2),
    "AscendDequant": range(1, 3),
    "BasicLSTMInplaceFillWindowCache": range(1, 10),
    "BasicGRUInplaceFillWindowCache": range(1, 9),
}
"""How many inputs may be written; what must be among them, the lint says."""
_SCALARS = (onnx.AttributeProto.FLOAT, onnx.AttributeProto.INT)
_TYPES = {
    **dict.fromkeys(("scale", "offset", "sqrt_mode", "relu_flag", "dtype"), _SCALARS),
    **dict.fromkeys(("dst_type", "round_mode"), (*_SCALARS, onnx.AttributeProto.STRING)),
}
"""Types of attributes with which the lint says what is wrong."""


class DeployFile:
    """One deploy model, read once.

    Args:
        proto: The model.
        folder: Where its external data lies.

    Raises:
        ValueError: A node of Ascend's lacks an input or output, or has an attribute that is no
            number where one must be; all of them are named.
    """

    def __init__(self, proto: onnx.ModelProto, folder: Path) -> None:
        self.proto, self._folder = proto, folder
        self.nodes = named_by_domain(proto.graph.node)
        _check_ascend(self.nodes)
        self._initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.maker = {output: node for node in self.nodes for output in node.output if output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in proto.graph.output}

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """The initializer of that name, its type and shape at hand."""
        return self._initializers.get(name)

    def array(self, name: str) -> NDArray[Any] | None:
        """The values of an initializer."""
        tensor = self._initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor, str(self._folder))

    @cached_property
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Known shapes of inputs, outputs and what lies between; unknown sizes are None."""
        graph = self.proto.graph
        return {
            value.name: tuple(
                d.dim_value if d.HasField("dim_value") else None
                for d in value.type.tensor_type.shape.dim
            )
            for value in (*graph.input, *graph.output, *graph.value_info)
            if value.type.tensor_type.HasField("shape")
        }

    def quant_before(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The AscendQuant whose integers a node reads as its data."""
        made = self.maker.get(node.input[0]) if node.input else None
        return made if made is not None and made.op_type == "AscendQuant" else None

    def is_integer_layer(self, node: onnx.NodeProto) -> bool:
        """Whether a node computes on integers: its data or its weight are."""
        if node.op_type not in LAYER_TYPES or len(node.input) < 2:
            return False
        weight = self.tensor(node.input[1])
        return self.quant_before(node) is not None or (
            weight is not None and weight.data_type == onnx.TensorProto.INT8
        )

    def channels(self, node: onnx.NodeProto) -> int | None:
        """Output channels of a layer, where its weight says."""
        weight = self.tensor(node.input[1])
        if weight is None or len(weight.dims) < 2:
            return None
        if node.op_type == "Conv":
            return int(weight.dims[0])
        return int(weight.dims[1]) * int(attributes(node).get("group", 1))


def _check_ascend(nodes: Iterable[onnx.NodeProto]) -> None:
    """Check what onnx checks of its own operators."""
    problems = [problem for node in nodes for problem in _ascend_problems(node)]
    if problems:
        raise ValueError(f"Nodes of Ascend's must be whole:{''.join(problems)}")


def _ascend_problems(node: onnx.NodeProto) -> Iterator[str]:
    if node.op_type not in _INPUTS:
        return
    wanted, found = _INPUTS[node.op_type], len(node.input)
    if found not in wanted or not all(node.input[: wanted.start]):
        yield (
            f"\n  {name_of(node)!r} ({node.op_type}) must have {wanted.start} to "
            f"{wanted.stop - 1} inputs; it has {found}."
        )
    if not node.output or not node.output[0]:
        yield f"\n  {name_of(node)!r} ({node.op_type}) must have an output; it has none."
    for attribute in node.attribute:
        if attribute.type not in _TYPES.get(attribute.name, (attribute.type,)):
            kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
            yield (
                f"\n  {name_of(node)!r} ({node.op_type}) must have a single value as "
                f"{attribute.name!r}; it has {kind}."
            )


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values, strings as str."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {
        k: v.decode("utf-8", "replace") if isinstance(v, bytes) else v for k, v in values.items()
    }


def name_of(node: onnx.NodeProto) -> str:
    """A node's name, else its output's, else its operator."""
    return node.name or next(iter(node.output), "") or node.op_type


def scales_of(param: NDArray[Any]) -> NDArray[np.float32]:
    """The float32 numbers in the low halves of a dequant parameter."""
    return param.astype(np.uint64).astype(np.uint32).view(np.float32)
