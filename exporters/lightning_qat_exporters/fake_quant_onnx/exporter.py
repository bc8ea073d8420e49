"""Fake-quant ONNX: QuantizeLinear and DequantizeLinear, for ONNX Runtime, TensorRT, OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import onnx
import onnx_ir as ir
from onnx import numpy_helper

from lightning_qat.export.files.inspection import Inspection
from lightning_qat.export.lint import Finding
from lightning_qat.export.protocol import Array, Artifact, UnsupportedByTarget
from lightning_qat.export.trace import Trace
from lightning_qat.ir.finer_biases import with_finer_biases
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat_exporters.fake_quant_onnx.flat_concats import flatten_concats
from lightning_qat_exporters.fake_quant_onnx.inspect import inspect_onnx
from lightning_qat_exporters.fake_quant_onnx.int32_bias import quantize_biases
from lightning_qat_exporters.fake_quant_onnx.read_back import (
    activation_differences,
    bias_differences,
    weight_differences,
)
from lightning_qat_exporters.fake_quant_onnx.refusals import (
    refused_by_openvino,
    refused_by_tensorrt,
)
from lightning_qat_exporters.fake_quant_onnx.runtimes import (
    LITERAL,
    SATURATION,
    explanations,
    installed_runtimes,
    may_saturate,
    run_in,
)
from lightning_qat_exporters.fake_quant_onnx.tensorrt_lint.lint import lint_tensorrt
from lightning_qat_exporters.fake_quant_onnx.trace import trace_qdq
from lightning_qat_exporters.fake_quant_onnx.unfused_softmax import unfuse_softmax
from lightning_qat_exporters.onnx_files.read import load_proto, load_with_data
from lightning_qat_exporters.onnx_files.write import save_onnx
from lightning_qat_exporters.qdq.build import INT4_GRID, OPSET, ActivationType, build_qdq
from lightning_qat_exporters.qdq.translate import keys_of
from lightning_qat_exporters.stored_bits import stored_in_bytes

ForRuntime = Literal["onnxruntime", "openvino", "tensorrt"]


class FakeQuantOnnxExporter:
    """Writes ``<prefix>_qdq.onnx``: every quantized tensor explicit, weights stored as integers.

    Nodes keep the names of their layers; batch norm is folded; the batch dimension is dynamic where
    the model allows it. Activations of fewer than 8 bits get a ``Clip`` between Q and DQ, weights
    of fewer bits are stored as int8, or those of 4 bits as ONNX's INT4.

    Args:
        activation_type: Type of 8-bit activations. ``uint8`` is what ONNX Runtime's integer
            kernels want on x86, and the default but for TensorRT, which takes ``int8`` alone.
        quantize_bias: Store biases as int32 on the grid ``scale_input * scale_weight`` that integer
            kernels add them on, instead of float.
        opset: 18 or newer. ONNX Runtime 1.31 mis-propagates ``output_dtype`` at 21, so 20 is the
            default; 16-bit activations need 21.
        int4_weights: Store weights of 4 bits as INT4, two to a byte; needs opset 21.
        for_runtime: What must read the file. ``openvino`` writes concatenations in a form that
            OpenVINO computes right, and refuses activations of 16 bits, which OpenVINO leaves out.
            ``tensorrt`` writes ``int8`` and refuses what TensorRT does: above all zero points.

    Raises:
        ValueError: An option is outside what is listed.
    """

    name = "fake_quant_onnx"

    def __init__(
        self,
        activation_type: ActivationType | None = None,
        quantize_bias: bool = False,
        opset: int = OPSET,
        int4_weights: bool = False,
        for_runtime: ForRuntime = "onnxruntime",
    ) -> None:
        if for_runtime not in get_args(ForRuntime):
            raise ValueError(
                f"for_runtime must be one of {', '.join(map(repr, get_args(ForRuntime)))}; got "
                f"{for_runtime!r}."
            )
        if activation_type is None:
            activation_type = "int8" if for_runtime == "tensorrt" else "uint8"
        if activation_type not in ("int8", "uint8"):
            raise ValueError(f"activation_type must be 'int8' or 'uint8'; got {activation_type!r}.")
        if opset < 18:
            raise ValueError(f"opset must be 18 or newer; got {opset!r}.")
        if int4_weights and opset < 21:
            raise ValueError(f"int4_weights needs opset 21, the first with INT4; got {opset!r}.")
        if for_runtime == "tensorrt" and (activation_type != "int8" or quantize_bias):
            raise ValueError(
                "for_runtime='tensorrt' needs activation_type='int8' and quantize_bias=False, for "
                f"TensorRT has no UINT8 and no INT32 DequantizeLinear; got {activation_type!r} and "
                f"{quantize_bias}."
            )
        self.activation_type: ActivationType = activation_type
        self.quantize_bias = quantize_bias
        self.opset = opset
        self.int4_weights = int4_weights
        self.for_runtime: ForRuntime = for_runtime

    @property
    def runtimes(self) -> tuple[str, ...]:
        """ONNX Runtime as the file is written, with its default optimizations, and OpenVINO."""
        return installed_runtimes()

    def check_available(self) -> None:
        """Everything this exporter needs is a dependency of the package."""

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        """Write ``<prefix>_qdq.onnx``, atomically.

        Raises:
            UnsupportedByTarget: 16-bit activations below opset 21, or what the runtime of
                ``for_runtime`` refuses; all are named.
        """
        refused = {"openvino": refused_by_openvino, "tensorrt": refused_by_tensorrt}
        if self.for_runtime in refused and (problems := [*refused[self.for_runtime](model)]):
            raise UnsupportedByTarget(self.name, problems)
        onnx_model = build_qdq(
            self._stored(model),
            target=self.name,
            opset=self.opset,
            activation_type=self.activation_type,
            int4_weights=self.int4_weights,
            # An integer bias needs a Gemm.
            split_gemms=not self.quantize_bias,
        )
        if self.quantize_bias:
            quantize_biases(onnx_model.graph)
        if self.for_runtime == "openvino":
            flatten_concats(onnx_model.graph)
        if self.for_runtime == "onnxruntime":
            unfuse_softmax(onnx_model.graph)
        path = path_prefix.with_name(f"{path_prefix.name}_qdq.onnx")
        files = save_onnx(onnx_model, path)
        notes = _int4_notes(model) if self.int4_weights else ()
        written: dict[str, Path] = dict(zip(("model", "weights"), files, strict=False))
        return Artifact(self.name, written, notes, _dequantized(onnx_model.graph))

    def run(
        self, artifact: Artifact, runtime: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run the file on a batch; ``runtime`` is one of ``runtimes``."""
        return run_in(runtime, artifact.files["model"], inputs)

    @property
    def traced_runtime(self) -> str:
        """ONNX Runtime as the file is written: its optimizations merge tensors away."""
        return LITERAL

    def trace(
        self,
        artifact: Artifact,
        inputs: Mapping[str, Array],
        given: Mapping[str, Array] | None = None,
    ) -> Trace:
        """Run the file and show every activation behind its DequantizeLinear."""
        return trace_qdq(artifact.files["model"], self.traced_runtime, inputs, given or {})

    def explain(self, max_steps: Mapping[str, float]) -> tuple[str, ...]:
        """Explain large differences: what runtimes and CPUs are known to compute otherwise."""
        return tuple(
            explanations(
                max_steps,
                self.activation_type,
                wide=self.opset >= 21,
                flat_concats=self.for_runtime == "openvino",
            )
        )

    def cautions(self, model: QuantizedModel) -> tuple[str, ...]:
        """Say before training that products may saturate, and that few bits take 8."""
        saturates = self.for_runtime == "onnxruntime" and may_saturate(model)
        stored = stored_in_bytes(
            model,
            packed=self._packed,
            remedy="int4_weights=True with opset=21 packs weights of 4 bits.",
        )
        return (*((SATURATION,) if saturates else ()), *stored)

    def lint(self, path: str | Path) -> tuple[Finding, ...]:
        """Check a QDQ file of any tool against the rules that TensorRT is known to have.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no QDQ file, or this exporter does not write for TensorRT.
        """
        if self.for_runtime != "tensorrt":
            raise ValueError(
                "Rules for QDQ files are known of TensorRT alone: lint with "
                f"FakeQuantOnnxExporter(for_runtime='tensorrt'); got {self.for_runtime!r}."
            )
        return lint_tensorrt(Path(path))

    def inspect(self, path: Path) -> Inspection | None:
        """What an ONNX file of anyone quantizes with pairs; ``None``: it is no ONNX file."""
        return inspect_onnx(path) if path.suffix == ".onnx" else None

    def artifact_of(self, path: Path) -> Artifact | None:
        """A QDQ file of anyone as an artifact; ``None``: it is no ONNX file, or without pairs."""
        if path.suffix != ".onnx":
            return None
        nodes = load_proto(path).graph.node
        has_pairs = any(node.op_type == "QuantizeLinear" for node in nodes)
        return Artifact(self.name, {"model": path}) if has_pairs else None

    def differences(self, model: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
        """Compare every number in the file with the model's: scales, zero points, integers."""
        proto = load_with_data(artifact.files["model"])
        stored = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
        nodes: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.graph.node:
            for key in keys_of({prop.key: prop.value for prop in node.metadata_props}):
                nodes.setdefault(key, []).append(node)
        found: list[str] = []
        model = self._stored(model)
        for key, tensor in model.tensors.items():
            of_key = nodes.get(key, [])
            if not any(node.op_type == "DequantizeLinear" for node in of_key):
                found.append(f"{key}: the file has no DequantizeLinear for it")
                continue
            differ = weight_differences if tensor.kind == "weight" else activation_differences
            found += (f"{key}: {text}" for text in differ(tensor, of_key, stored))
        found += bias_differences(model, proto, stored)
        return tuple(dict.fromkeys(found))

    def _stored(self, model: QuantizedModel) -> QuantizedModel:
        """The model with the integers that the file has."""
        return with_finer_biases(model, keep=self._packed)

    @property
    def _packed(self) -> IntegerGrid | None:
        """The grid of weights that are stored two to a byte."""
        return INT4_GRID if self.int4_weights else None


def _dequantized(graph: ir.Graph) -> frozenset[str]:
    """Keys of the tensors that stand in the file as integers, for a runtime to compute with."""
    nodes = (node for node in graph if node.op_type == "DequantizeLinear")
    return frozenset(key for node in nodes for key in keys_of(node.metadata_props))


def _int4_notes(model: QuantizedModel) -> tuple[str, ...]:
    """One note on the size of INT4 weights, one on 4-bit weights that stay INT8."""
    weights = [t for t in model.tensors.values() if t.kind == "weight"]
    narrow = [t.integers for t in weights if t.qparams.grid == INT4_GRID]
    sizes = [integers.numel() for integers in narrow if integers is not None]
    notes = []
    if sizes:
        small = sum((size + 1) // 2 for size in sizes)
        notes.append(f"Weights of 4 bits as INT4: {len(sizes)}, {small} bytes for {sum(sizes)}.")
    mirrored = [
        t.key for t in weights if t.qparams.grid == IntegerGrid(INT4_GRID.qmin, -INT4_GRID.qmin)
    ]
    if mirrored:
        notes.append(
            f"{', '.join(mirrored)}: stored as INT8, because a negative factor of the batch norm "
            "folded into it makes 8 of -8."
        )
    return tuple(notes) or ("int4_weights: no weight has 4 bits, so none is stored as INT4.",)
