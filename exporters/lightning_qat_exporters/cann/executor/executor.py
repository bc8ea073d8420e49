"""Run a CANN deploy model in NumPy: the reference for what its integers mean.

The integer layers are computed exactly and the scalings in float32, by the definitions of Ascend's
operators. Every other operator is left to ``onnx.reference``, except the pools, which are slow
there, GatherElements, which has a limit there, and batch norm. No claim about the last bit on a
device: many of its kernels quantize in float16, which ``device_fp16`` simulates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from lightning_qat.ir.operators import LAYER_TYPES
from lightning_qat.out_of_memory import naming_memory_errors
from lightning_qat_exporters.cann.executor import recurrent as cells
from lightning_qat_exporters.cann.executor.domain import DOMAIN, Array, NodeRefused
from lightning_qat_exporters.cann.executor.evaluate import Evaluation
from lightning_qat_exporters.cann.executor.gather import GatherElements
from lightning_qat_exporters.cann.executor.layers import (
    BatchNormalization,
    Conv,
    ConvTranspose,
    Gemm,
    MatMul,
)
from lightning_qat_exporters.cann.executor.pools import AveragePool, MaxPool
from lightning_qat_exporters.cann.executor.quantize_ops import (
    AscendAntiQuant,
    AscendDequant,
    AscendQuant,
)
from lightning_qat_exporters.cann.executor.rules import check_deploy
from lightning_qat_exporters.onnx_files.checked_run import input_problems
from lightning_qat_exporters.onnx_files.read import load_with_data


class AscendExecutor:
    """A deploy model, ready to run on arrays.

    Integer layers: ``acc = layer(q - offset_d, W, zero padding) + B``, exact in BLAS, in
    floats that hold every integer that can occur. ``q = clip(rint(x * scale) + offset)``, as in
    AMCT's fake-quant model; CANN's text rounds after adding, which differs on exact ties alone.
    ``y = float32(acc) * scale`` with the low 32 bits of the dequant parameter as a float32.

    A weight with half as many input channels as its data is packed, two of 4 bits to a byte.

    Args:
        model: Path of a deploy model, or the model itself.
        device_fp16: Quantize as AscendQuant's kernels without float32 do: data, scale and offset
            become float16, and so do their product and their sum, which is rounded last.
        max_bytes: Most bytes that all tensors may take which are there at one time; 8 GiB.

    Raises:
        ValueError: An operator asks for what is not defined here: an unknown ``round_mode`` or
            ``dtype``, a dequant parameter with more than a float32 in it, an AscendDequant that
            no integer layer feeds.
    """

    def __init__(
        self,
        model: str | PathLike[str] | onnx.ModelProto | ir.Model,
        *,
        device_fp16: bool = False,
        max_bytes: int = 2**33,
    ) -> None:
        if isinstance(model, ir.Model):
            proto = ir.to_proto(model)
        elif isinstance(model, onnx.ModelProto):
            proto = model
        else:
            proto = load_with_data(Path(fspath(model)))
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        check_deploy(proto)
        stored = {tensor.name for tensor in proto.graph.initializer}
        names = (value.name for value in proto.graph.input)
        self.input_names = tuple(name for name in names if name not in stored)
        self.output_names = tuple(value.name for value in proto.graph.output)
        self._max_bytes = max_bytes
        self._wanted = dict(_wanted(proto))
        try:
            self._evaluator = ReferenceEvaluator(_resolved(proto, device_fp16), new_ops=list(_OPS))
        except (NodeRefused, MemoryError):
            raise
        except Exception as error:  # onnx raises many kinds
            raise ValueError(f"The deploy model cannot be run: {error}") from error

    @naming_memory_errors(
        "running a deploy file",
        "Give it a smaller batch: it computes in NumPy",
    )
    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Compute the model's outputs.

        Args:
            inputs: One array per input name.

        Returns:
            One array per output name, in order.

        Raises:
            ValueError: The names are not the model's, a tensor to quantize holds NaN, or an
                accumulator of 8-bit data leaves int32.
        """
        if set(inputs) != set(self.input_names):
            raise ValueError(
                f"The inputs must be {sorted(self.input_names)}; got {sorted(inputs)}."
            )
        # Of a part of a model, types may be unknown.
        typed = {name: array for name, array in inputs.items() if name in self._wanted}
        problems = [*input_problems(self._wanted, typed)]
        if problems:
            raise ValueError(
                "The inputs must be the model's:" + "".join(f"\n  {p}" for p in problems)
            )
        outputs = Evaluation(self._max_bytes).outputs(self._evaluator, inputs)
        return [np.array(output, order="C") for output in outputs]


def _wanted(
    model: onnx.ModelProto,
) -> Iterator[tuple[str, tuple[str, list[int | str | None] | None]]]:
    """Type and shape of each input, by name."""
    stored = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        kind = value.type.tensor_type
        if value.name in stored or not kind.elem_type:
            continue
        if kind.elem_type not in onnx.TensorProto.DataType.values():
            raise ValueError(
                f"The input {value.name!r} must have a type of ONNX; got the number "
                f"{kind.elem_type}."
            )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        sizes: list[int | str | None] = [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in kind.shape.dim
        ]
        yield value.name, (f"tensor({dtype})", sizes if kind.HasField("shape") else None)


def _resolved(model: onnx.ModelProto, device_fp16: bool) -> onnx.ModelProto:
    """A copy in which every operator computed here says all it needs to know by itself.

    A layer learns its input's offset from the AscendQuant before it, an AscendDequant its channel
    axis from the layer before it.
    """
    resolved = onnx.ModelProto()
    resolved.CopyFrom(model)
    resolved.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    names = {op.__name__ for op in _OPS}
    producers: dict[str, onnx.NodeProto] = {}
    for node in resolved.graph.node:
        for output in node.output:
            producers[output] = node
        before = producers.get(node.input[0]) if node.input else None
        quantized = before is not None and before.op_type == "AscendQuant"
        if node.op_type not in names or (node.op_type in ("Gemm", "MatMul") and not quantized):
            continue
        extra: dict[str, Any] = {"label": node.name}
        if quantized and node.op_type in LAYER_TYPES:
            assert before is not None
            extra["offset"] = _attributes(before).get("offset", 0.0)
        if node.op_type == "AscendQuant":
            extra["half"] = int(device_fp16)
        if node.op_type == "AscendDequant":
            if before is None or before.op_type not in LAYER_TYPES:
                raise ValueError(
                    "An AscendDequant must read the accumulator of one of "
                    f"{sorted(LAYER_TYPES)}; {node.name!r} reads {node.input[0]!r}."
                )
            extra["axis"] = 1 if before.op_type in ("Conv", "ConvTranspose") else -1
        node.domain = DOMAIN
        node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in extra.items())
    return resolved


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


class BasicLSTMInplaceFillWindowCache(OpRun):
    """See ``executor.recurrent.lstm``."""

    op_domain = DOMAIN

    def _run(self, *inputs: Array | None, **attributes: Any) -> tuple[Array, ...]:
        x, weight, recurrent, h, c, bias, _, _, param = inputs
        given = (x, weight, recurrent, h, c, bias, param)
        return cells.lstm(*given, **attributes)  # type: ignore[arg-type]


class BasicGRUInplaceFillWindowCache(OpRun):
    """See ``executor.recurrent.gru``."""

    op_domain = DOMAIN

    def _run(self, *inputs: Array | None, **attributes: Any) -> tuple[Array, ...]:
        x, weight, recurrent, h, bias, _, _, param = inputs
        given = (x, weight, recurrent, h, bias, param)
        return cells.gru(*given, **attributes)  # type: ignore[arg-type]


_OPS = (
    *(AscendQuant, AscendDequant, AscendAntiQuant),
    *(Conv, ConvTranspose, Gemm, MatMul),
    *(BatchNormalization, MaxPool, AveragePool, GatherElements),
    *(BasicLSTMInplaceFillWindowCache, BasicGRUInplaceFillWindowCache),
)
