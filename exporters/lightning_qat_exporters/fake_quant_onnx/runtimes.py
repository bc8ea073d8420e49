"""Where a QDQ file runs here, and why a runtime may differ from what is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lightning_qat.export.protocol import Array
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.onnx_files.run import has_vnni, run_onnx
from lightning_qat_exporters.onnx_files.run_openvino import has_openvino, run_openvino
from lightning_qat_exporters.qdq.build import ActivationType

LITERAL, OPTIMIZED, OPENVINO = "onnxruntime, no optimizations", "onnxruntime", "openvino"

SATURATION = (
    "on x86 CPUs without VNNI, ONNX Runtime may saturate products of 8-bit weights (docs/onnx.md). "
    "Two remedies: its session option session.x64quantprecision=1, or training with "
    "WeightSpec(bits=7)."
)

_LARGEST_SUM = 2**15 - 1
"""Of two products, which CPUs without VNNI add in 16 bits."""


def may_saturate(model: QuantizedModel) -> bool:
    """Whether two products of a layer's 8-bit input and its weight may exceed 16 bits.

    Inputs count from their least integer, as uint8 does.
    """
    for layer in model.layers:
        if layer.input_key not in model.tensors:
            continue
        data, weight = (
            model.tensors[key].qparams.grid for key in (layer.input_key, layer.weight_key)
        )
        steps = data.qmax - data.qmin
        if steps < 2**8 and 2 * steps * weight.qmax > _LARGEST_SUM:
            return True
    return False


def installed_runtimes() -> tuple[str, ...]:
    """ONNX Runtime as the file is written and with its default optimizations; OpenVINO if there."""
    return (LITERAL, OPTIMIZED, OPENVINO) if has_openvino() else (LITERAL, OPTIMIZED)


def run_in(runtime: str, path: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a file in one of ``installed_runtimes``."""
    if runtime == OPENVINO:
        return run_openvino(path, inputs)
    return run_onnx(path, inputs, optimize=runtime == OPTIMIZED)


def explanations(
    max_steps: Mapping[str, float],
    activation_type: ActivationType,
    *,
    wide: bool,
    flat_concats: bool,
) -> Iterator[str]:
    """What is behind large differences.

    Args:
        max_steps: By runtime, the largest difference in steps; a runtime that refuses the file is
            not in it.
        activation_type: Of the file's 8-bit activations.
        wide: The file may have 16-bit activations.
        flat_concats: Concatenations are written as OpenVINO computes them right.
    """
    if _differs(max_steps, OPTIMIZED) and activation_type == "uint8" and not has_vnni():
        yield (
            f"{max_steps[OPTIMIZED]:.3g} steps in the optimized session: this CPU has no VNNI "
            "instructions, so ONNX Runtime adds pairs of uint8 x int8 products in 16 bits, which "
            "may saturate. A device with VNNI computes what the other session does. On those "
            "without, set the session option session.x64quantprecision to 1, which adds exactly, "
            "or train with WeightSpec(bits=7)."
        )
    if OPENVINO not in max_steps:
        if has_openvino() and not flat_concats:
            yield (
                "OpenVINO refuses linear layers behind a concatenation or a stack over another "
                "axis than the last, as LSTM and GRU end with; "
                "FakeQuantOnnxExporter(for_runtime='openvino') writes those so that it does not."
            )
        return
    if not _differs(max_steps, OPENVINO):
        return
    causes = []
    if activation_type == "int8" and not flat_concats:
        causes.append(
            "it computes convolutions behind a concatenation of int8 tensors wrongly, which "
            "FakeQuantOnnxExporter(for_runtime='openvino') avoids"
        )
    if wide:
        causes.append("it leaves out QuantizeLinear and DequantizeLinear of 16 bits")
    if not has_vnni():
        causes.append(
            "this CPU has no VNNI instructions, so products of 8-bit weights may saturate there, "
            "too; those of WeightSpec(bits=7) do not"
        )
    if causes:
        yield f"{max_steps[OPENVINO]:.3g} steps in OpenVINO. Known causes: {'; '.join(causes)}."


def _differs(max_steps: Mapping[str, float], runtime: str) -> bool:
    """More than two steps, and more than twice what the file as it is written does."""
    return max_steps[runtime] > 2 and max_steps[runtime] > 2 * max_steps[LITERAL]
