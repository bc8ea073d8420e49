"""Convert quantized ONNX models that other tools trained; how a target does it is its exporter's.

An exporter that takes such models has ``convert_onnx``; nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning_qat.export.load import load_exporter


@dataclass(frozen=True)
class Conversion:
    """What became of a quantized ONNX model. ``print`` shows it.

    Args:
        files: What each file is (``model``, ``fake_quant``, ``record``) and where.
        layers: Names of the layers that compute with integers.
        joins: Names of the other nodes that read quantized tensors.
        outputs: Names of the graph outputs that are integers.
        left_float: Layers and constants that keep real values, each with the reason.
        notes: What was added so that the files compute the same, one sentence each.
    """

    files: Mapping[str, Path]
    layers: tuple[str, ...]
    joins: tuple[str, ...]
    outputs: tuple[str, ...]
    left_float: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Counts, what stayed real and why, and the files."""
        lines = [
            f"{len(self.layers)} layers on integers, {len(self.joins)} other readers of quantized "
            f"tensors, {len(self.outputs)} integer outputs, {len(self.left_float)} left real"
        ]
        lines += [f"  left real: {remark}" for remark in self.left_float]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join([*lines, *(f"  {role}: {path}" for role, path in self.files.items())])


@runtime_checkable
class ConvertsOnnx(Protocol):
    """An exporter that takes quantized ONNX models of other tools."""

    def convert_onnx(
        self,
        model_file: Path,
        path_prefix: Path,
        record_file: Path | None = None,
        *,
        float_bias: bool = False,
        grid_weights: bool = False,
        max_bytes: int | None = None,
    ) -> Conversion:
        """Write the target's files; parameters as for ``convert_qat_model``."""
        ...


def convert_qat_model(
    model_file: str | Path,
    save_path: str | Path,
    record_file: str | Path | None = None,
    *,
    target: str | ConvertsOnnx = "cann",
    float_bias: bool = False,
    grid_weights: bool = False,
    max_bytes: int | None = None,
) -> Conversion:
    """Bring a quantized ONNX model of any tool to an integer target; AMCT's function of this name.

    Quantized are: Conv, ConvTranspose, Gemm and MatMul whose data and constant weight both come
    from DequantizeLinear; every other operator that reads a Q/DQ pair (Add and other joins), in
    real values on the pair's grid; outputs that are QuantizeLinear. Weights may be stored as
    integers or as float before QuantizeLinear. What does not match stays real and is listed.

    Biases become ``round(bias / (scale_d * scale_w))`` in the fake-quant model as well, so the
    deploy model computes the same.

    Args:
        model_file: ONNX model with QuantizeLinear and DequantizeLinear, opset 10 or newer.
        save_path: Folder and beginning of the files' names: ``<save_path>_deploy_model.onnx`` and
            ``<save_path>_fake_quant_model.onnx``.
        record_file: Where to write the scales and offsets in AMCT's form, as text, or in protobuf's
            binary form where the name ends in ``.pb``; not written by default.
        target: Name of the exporter, or one with options, such as ``CannExporter(opset=13)``.
        float_bias: Keep biases in float and add them after the layers.
        grid_weights: Take float weights that are products of integers up to 127 and one scale per
            output channel, to float32's precision, as those integers; each is said. TensorFlow's
            converters write weights so.
        max_bytes: Most bytes that the model's tensors may take in memory, those of its files and
            those made of them, each counted once. By default 16 times the size of the files, and 1
            GiB in any case: a file of 2 KB may ask for more than there is.

    Returns:
        What was converted, what stayed real and why, and the files.

    Raises:
        FileNotFoundError: There is no such model, or its external data is missing.
        ValueError: The file is no quantized ONNX model or breaks a rule of ONNX, nothing in it can
            be quantized, a quantized part has no integer form, or its tensors take more than
            ``max_bytes``; node and tensor are named. Nothing was written.
        OSError: The files cannot be written.
    """
    exporter = load_exporter(target) if isinstance(target, str) else target
    if not isinstance(exporter, ConvertsOnnx):
        raise ValueError(
            f"The target must be one that takes ONNX models, such as 'cann'; {target!r} does not."
        )
    return exporter.convert_onnx(
        Path(model_file),
        Path(save_path),
        None if record_file is None else Path(record_file),
        float_bias=float_bias,
        grid_weights=grid_weights,
        max_bytes=max_bytes,
    )
