"""Fake-quant ONNX: QuantizeLinear and DequantizeLinear, for ONNX Runtime, TensorRT, OpenVINO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper

from lightning_qat.arithmetic import accumulator_scale, quantize_bias
from lightning_qat.export import Array, Artifact
from lightning_qat.qparams import Grid
from lightning_qat.quantized_model import QuantizedModel, QuantizedTensor
from lightning_qat_exporters._files import save_onnx
from lightning_qat_exporters._initializers import array_of, initializer
from lightning_qat_exporters._qdq import (
    FULL_GRIDS,
    INT4_GRID,
    OPSET,
    ActivationType,
    build_qdq,
    layer_of,
)
from lightning_qat_exporters._runtime import has_vnni, run_onnx
from lightning_qat_exporters._translation import keys_of

_RUNTIMES = {"onnxruntime, no optimizations": False, "onnxruntime": True}


class FakeQuantOnnxExporter:
    """Writes ``<prefix>_qdq.onnx``: every quantized tensor explicit, weights stored as integers.

    Nodes keep the names of their layers; batch norm is folded; the batch dimension is dynamic where
    the model allows it. Activations of fewer than 8 bits get a ``Clip`` between Q and DQ, weights
    of fewer bits are stored as int8, or those of 4 bits as ONNX's INT4.

    Args:
        activation_type: Type of 8-bit activations. ``uint8`` is what ONNX Runtime's integer
            kernels want on x86; TensorRT wants ``int8`` (and symmetric activations).
        quantize_bias: Store biases as int32 on the grid ``scale_input * scale_weight`` that integer
            kernels add them on, instead of float.
        opset: 18 or newer. ONNX Runtime 1.31 mis-propagates ``output_dtype`` at 21, so 20 is the
            default; 16-bit activations need 21.
        int4_weights: Store weights of 4 bits as INT4, two to a byte; needs opset 21.

    Raises:
        ValueError: An option is outside what is listed.
    """

    name = "fake_quant_onnx"

    def __init__(
        self,
        activation_type: ActivationType = "uint8",
        quantize_bias: bool = False,
        opset: int = OPSET,
        int4_weights: bool = False,
    ) -> None:
        if activation_type not in ("int8", "uint8"):
            raise ValueError(f"activation_type must be 'int8' or 'uint8'; got {activation_type!r}.")
        if opset < 18:
            raise ValueError(f"opset must be 18 or newer; got {opset!r}.")
        if int4_weights and opset < 21:
            raise ValueError(f"int4_weights needs opset 21, the first with INT4; got {opset!r}.")
        self.activation_type: ActivationType = activation_type
        self.quantize_bias = quantize_bias
        self.opset = opset
        self.int4_weights = int4_weights

    @property
    def runtimes(self) -> tuple[str, ...]:
        """ONNX Runtime as the file is written, and with its default optimizations."""
        return tuple(_RUNTIMES)

    def check_available(self) -> None:
        """Everything this exporter needs is a dependency of the package."""

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        """Write ``<prefix>_qdq.onnx``, atomically.

        Raises:
            UnsupportedByTarget: 16-bit activations below opset 21; all are named.
        """
        onnx_model = build_qdq(
            model,
            target=self.name,
            opset=self.opset,
            activation_type=self.activation_type,
            int4_weights=self.int4_weights,
        )
        if self.quantize_bias:
            _quantize_biases(onnx_model.graph)
        path = path_prefix.with_name(f"{path_prefix.name}_qdq.onnx")
        files = save_onnx(onnx_model, path)
        notes = _int4_notes(model) if self.int4_weights else ()
        return Artifact(self.name, dict(zip(("model", "weights"), files, strict=False)), notes)

    def run(
        self, artifact: Artifact, runtime: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run the file on a batch; ``runtime`` is one of ``runtimes``."""
        return run_onnx(artifact.files["model"], inputs, optimize=_RUNTIMES[runtime])

    def explain(self, max_steps: Mapping[str, float]) -> tuple[str, ...]:
        """Say so where 8-bit products saturate: without VNNI instructions, in optimized kernels."""
        literal, optimized = (max_steps[runtime] for runtime in _RUNTIMES)
        if self.activation_type != "uint8" or optimized <= 2 or optimized <= 2 * literal:
            return ()
        if has_vnni():
            return ()
        return (
            f"{optimized:.3g} steps in the optimized session: this CPU has no VNNI instructions, "
            "so ONNX Runtime adds pairs of uint8 x int8 products in 16 bits, which may saturate. "
            "A device with VNNI computes what the other session does; for those without, train "
            "with WeightSpec(bits=7).",
        )

    def differences(self, model: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
        """Compare every number in the file with the model's: scales, zero points, integers."""
        proto = onnx.load(artifact.files["model"])
        stored = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
        nodes: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.graph.node:
            for key in keys_of({prop.key: prop.value for prop in node.metadata_props}):
                nodes.setdefault(key, []).append(node)
        found: list[str] = []
        for key, tensor in model.tensors.items():
            of_key = nodes.get(key, [])
            if not any(node.op_type == "DequantizeLinear" for node in of_key):
                found.append(f"{key}: the file has no DequantizeLinear for it")
                continue
            differ = _weight_differences if tensor.kind == "weight" else _activation_differences
            found += (f"{key}: {text}" for text in differ(tensor, of_key, stored))
        found += _bias_differences(model, proto, stored)
        return tuple(dict.fromkeys(found))


def _int4_notes(model: QuantizedModel) -> tuple[str, ...]:
    """How much smaller weights have become, and which have not."""
    weights = [t for t in model.tensors.values() if t.kind == "weight"]
    narrow = [t.integers for t in weights if t.qparams.grid == INT4_GRID]
    sizes = [integers.numel() for integers in narrow if integers is not None]
    notes = []
    if sizes:
        small = sum((size + 1) // 2 for size in sizes)
        notes.append(f"Weights of 4 bits as INT4: {len(sizes)}, {small} bytes for {sum(sizes)}.")
    mirrored = [t.key for t in weights if t.qparams.grid == Grid(INT4_GRID.qmin, -INT4_GRID.qmin)]
    if mirrored:
        notes.append(
            f"{', '.join(mirrored)}: stored as INT8, because a negative factor of the batch norm "
            "folded into it makes 8 of -8."
        )
    return tuple(notes) or ("int4_weights: no weight has 4 bits, so none is stored as INT4.",)


def _weight_differences(
    tensor: QuantizedTensor, nodes: list[onnx.NodeProto], stored: Mapping[str, Array]
) -> Iterator[str]:
    for node in nodes:
        integers, axis = stored[node.input[0]], tensor.qparams.axis
        if node.input[0].endswith("_transposed"):
            integers, axis = integers.T, None if axis is None else 1 - axis
        yield from _compare("scale", stored[node.input[1]], tensor.qparams.scale)
        yield from _compare("integers", integers, tensor.integers)
        if len(node.input) > 2 and stored[node.input[2]].any():
            yield "the zero point of a weight must be 0"
        if axis is not None and _axis(node) != axis:
            yield f"the channel axis must be {axis}; the file has {_axis(node)}"


def _activation_differences(
    tensor: QuantizedTensor, nodes: list[onnx.NodeProto], stored: Mapping[str, Array]
) -> Iterator[str]:
    grid = tensor.qparams.grid
    pairs = [n for n in nodes if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    shift = 0
    for node in pairs:
        origin = stored[node.input[2]]
        shift = 128 if origin.dtype == np.uint8 else 0
        yield from _compare("scale", stored[node.input[1]], tensor.qparams.scale)
        yield from _compare(
            "zero point", origin.astype(np.int32) - shift, tensor.qparams.zero_point
        )
    if sum(n.op_type == "QuantizeLinear" for n in pairs) * 2 != len(pairs):
        yield "QuantizeLinear and DequantizeLinear must come in pairs"
    clips = [n for n in nodes if n.op_type == "Clip"]
    full = (grid.qmin, grid.qmax) in FULL_GRIDS
    if not full and len(clips) * 2 != len(pairs):
        yield f"a Clip to {grid.qmin} .. {grid.qmax} must stand between Q and DQ"
    for clip in clips:
        bounds = tuple(int(stored[name]) - shift for name in clip.input[1:])
        if bounds != (grid.qmin, grid.qmax):
            yield f"the grid must be {grid.qmin} .. {grid.qmax}; the file clips to {bounds}"


def _bias_differences(
    model: QuantizedModel, proto: onnx.ModelProto, stored: Mapping[str, Array]
) -> Iterator[str]:
    nodes = {node.name: node for node in proto.graph.node}
    made_by = {output: node for node in proto.graph.node for output in node.output}
    readers = {name: node for node in proto.graph.node for name in node.input}
    calls: Counter[str] = Counter()
    for layer in model.layers:
        name = f"{layer.name}_{calls[layer.name]}" if calls[layer.name] else layer.name
        calls[layer.name] += 1
        node = nodes.get(name or "layer")
        if node is None:
            yield f"{name}: the file has no layer of that name"
            continue
        if layer.bias is None:
            continue
        source = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "MatMul":
            added = readers[node.output[0]].input
            source = next(value for value in added if value != node.output[0])
        expected = layer.bias
        if not source:
            # torch.onnx leaves out a bias of zeros.
            if expected.any():
                yield f"{name}: the file has no bias"
            continue
        if source not in stored and made_by[source].op_type == "DequantizeLinear":
            source = made_by[source].input[0]
            scales = (model.tensors[k].qparams.scale for k in (layer.input_key, layer.weight_key))
            expected = quantize_bias(layer.bias, *scales).to(torch.int32)
        for text in _compare("the bias", stored[source], expected):
            yield f"{name}: {text}"


def _axis(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "axis"), 1)


def _compare(what: str, stored: Array, expected: Any) -> Iterator[str]:
    wanted = expected.numpy()
    if stored.shape != wanted.shape:
        yield f"{what} has shape {stored.shape}, the model {wanted.shape}"
    elif not np.array_equal(stored, wanted):
        count = int(np.sum(stored != wanted))
        yield f"{count} of {wanted.size} values of {what} differ from the model's"


def _quantize_biases(graph: ir.Graph) -> None:
    """Store the bias of every quantized layer on the grid of its accumulator."""
    for node in list(graph):
        if layer_of(node) is None or node.op_type == "MatMul" or len(node.inputs) < 3:
            continue
        bias = array_of(node.inputs[2])
        scale_input, scale_weight = (_scale_of(value) for value in node.inputs[:2])
        if bias is None or scale_input is None or scale_weight is None:
            continue
        integers = quantize_bias(torch.from_numpy(bias.copy()), scale_input, scale_weight).numpy()
        limits = np.iinfo(np.int32)
        if integers.min() < limits.min or integers.max() > limits.max:
            # Saturating a bias would change the function; a float bias is exact.
            continue
        step = accumulator_scale(scale_input, scale_weight, len(integers)).numpy()
        constants = [
            initializer(graph, f"{node.name}.bias_int32", integers.astype(np.int32)),
            initializer(graph, f"{node.name}.bias_int32_scale", step),
        ]
        name = f"{node.name}.bias.DequantizeLinear"
        axis = ir.AttrInt64("axis", 0)
        dequantize = ir.Node("", "DequantizeLinear", constants, [axis], name=name)
        dequantize.outputs[0].name = f"{node.name}.bias.real"
        graph.insert_before(node, dequantize)
        old = node.inputs[2]
        node.replace_input_with(2, dequantize.outputs[0])
        if old is not None and old.name is not None and not old.uses():
            graph.initializers.pop(old.name)


def _scale_of(value: ir.Value | None) -> torch.Tensor | None:
    producer = None if value is None else value.producer()
    scale = None if producer is None else array_of(producer.inputs[1])
    return None if scale is None else torch.from_numpy(scale.copy())
