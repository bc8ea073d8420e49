"""What an ONNX file says of itself: constants, shapes, makers, sizes, multiplications."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import onnx
from onnx import numpy_helper

from lightning_qat.export.files.inspection import counted, sizes
from lightning_qat.export.protocol import Array
from lightning_qat.ir.operators import LAYER_TYPES, value_preserving
from lightning_qat_exporters.onnx_files.other_domains import named_by_domain
from lightning_qat_exporters.onnx_files.read import load_proto

PRODUCTS = (*LAYER_TYPES, "Einsum", "Attention", "LSTM", "GRU", "RNN")
"""Operators that multiply as layers do."""

_MOVES = frozenset({*value_preserving("onnx"), "Relu", "Concat", "Pad"})


class GraphFacts:
    """The main graph of a file.

    Args:
        path: The ONNX file; data outside it are read where they are asked for.

    Raises:
        FileNotFoundError: There is no such file, or external data are missing.
        ValueError: It is no ONNX model.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.proto = path, load_proto(path)
        self.nodes = named_by_domain(self.proto.graph.node)
        self.made_by = {name: node for node in self.nodes for name in node.output if name}
        self._stored = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                values = [a.t for a in node.attribute if a.name == "value"]
                self._stored.update(zip(node.output, values, strict=False))
        self.files = self._files()
        """Bytes of the file and of those that hold its external data."""

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is stored in the file."""
        return name in self._stored

    def type_of(self, name: str) -> str | None:
        """The type of a constant, such as ``int8``; ``None``: it is none."""
        if name not in self._stored:
            return None
        return str(onnx.TensorProto.DataType.Name(self._stored[name].data_type)).lower()

    def array(self, name: str) -> Array | None:
        """The values of a constant.

        Raises:
            ValueError: They cannot be read.
        """
        if name not in self._stored:
            return None
        try:
            return numpy_helper.to_array(self._stored[name], str(self.path.parent))
        except Exception as error:  # onnx raises many kinds
            raise ValueError(
                f"The tensor {name!r} of {str(self.path)!r} cannot be read: {error}"
            ) from error

    @property
    def operators(self) -> dict[str, int]:
        """How often each operator is in the file, with its domain where that is not ONNX's."""
        return counted(node.op_type for node in self.nodes if node.op_type != "Constant")

    def _files(self) -> dict[Path, int]:
        names = {
            entry.value
            for tensor in self._stored.values()
            for entry in tensor.external_data
            if entry.key == "location"
        }
        beside = [self.path.parent / name for name in sorted(names)]
        missing = [path for path in beside if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{str(self.path)!r} has data in {str(missing[0])!r}; no file is there. Put it "
                "beside the model."
            )
        return sizes([self.path, *beside])

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Known shapes; a size that is not fixed counts as 1."""
        try:
            graph = onnx.shape_inference.infer_shapes(self.proto, data_prop=True).graph
        except Exception:  # of operators that it does not know, or a model above 2 GB
            graph = self.proto.graph
        found = {name: [*tensor.dims] for name, tensor in self._stored.items()}
        for value in (*graph.input, *graph.output, *graph.value_info):
            kind = value.type.tensor_type
            if kind.HasField("shape"):
                sizes_of = (d.dim_value if d.HasField("dim_value") else 1 for d in kind.shape.dim)
                found.setdefault(value.name, [*sizes_of])
        return found

    def source(self, name: str) -> onnx.NodeProto | None:
        """What made a tensor, looking through what moves values."""
        node = self.made_by.get(name)
        while node is not None and node.op_type in _MOVES and node.input[0] in self.made_by:
            node = self.made_by[node.input[0]]
        return node

    def macs(self, node: onnx.NodeProto) -> int | None:
        """Multiplications of a layer for one sample; ``None``: a shape is unknown."""
        if node.op_type not in LAYER_TYPES:
            return None
        made, data = self.shapes.get(node.output[0]), self.shapes.get(node.input[0])
        weight = self._weight_shape(node.input[1])
        if made is None or not data or not weight:
            return None
        if node.op_type == "Conv":
            return math.prod(made) * math.prod(weight[1:])
        if node.op_type == "ConvTranspose":
            return math.prod(data) * math.prod(weight[1:])
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(made) * (data[0] if transposed else data[-1])

    def _weight_shape(self, name: str) -> list[int] | None:
        if name in self.shapes:
            return self.shapes[name]
        node = self.made_by.get(name)
        return None if node is None else self.shapes.get(node.input[0])


def name_of(node: onnx.NodeProto) -> str:
    """A node's name, else its output's, else its operator."""
    return node.name or next(iter(node.output), "") or node.op_type
