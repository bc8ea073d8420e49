"""Huawei CANN: deploy ONNX with AscendQuant and AscendDequant, its simulation, its record."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import onnx_ir as ir
import torch

from lightning_qat.atomic import replacing
from lightning_qat.export import Array, Artifact, Unsupported, UnsupportedByTarget
from lightning_qat.findings import Finding
from lightning_qat.qat_model import Conversion
from lightning_qat.quantized_model import QuantizedModel
from lightning_qat.record import format_record
from lightning_qat_exporters._ascend import to_deploy, to_fake_quant
from lightning_qat_exporters._ascend_executor import AscendExecutor
from lightning_qat_exporters._canonical import canonical
from lightning_qat_exporters._deploy_differences import deploy_differences
from lightning_qat_exporters._files import require_writable, write_onnx
from lightning_qat_exporters._lint import lint_deploy
from lightning_qat_exporters._onnx_source import read_onnx, require_quantized
from lightning_qat_exporters._qdq import OPSET, build_qdq
from lightning_qat_exporters._quantized_ops import (
    NotExpressible,
    find_quantized,
    integer_outputs,
    joins,
)
from lightning_qat_exporters._record import layer_records
from lightning_qat_exporters._runtime import run_onnx
from lightning_qat_exporters._wide_weights import SHIFT

REFERENCE = "reference executor"
SIMULATION = "onnxruntime, fake-quant model"


class CannExporter:
    """Writes what ATC takes for an Ascend device, in the format of Huawei AMCT.

    ``<prefix>_deploy_model.onnx``: integer weights and biases between AscendQuant and
    AscendDequant, for ATC. ``<prefix>_fake_quant_model.onnx``: the same numbers in standard float
    operators, for ONNX Runtime; exact while an accumulator stays below 2**24.
    ``<prefix>_record.txt``: AMCT's record of scales and offsets.

    No Ascend device or ATC was available to its authors: the format is compared with files that
    AMCT wrote, the arithmetic with AMCT's own simulation. Many device kernels round activations to
    float16 before they quantize, so the last bit of a device cannot be promised.

    Args:
        opset: 11 to 18. All CANN versions parse 11; use more only where an operator needs it.
        int4_weights: Pack weights of 4 bits two to a byte, as AMCT does, for the products that
            compute with them (Atlas inference products). Otherwise they are bytes, which every
            product takes. Layers with groups or an odd number of input channels stay bytes.

    Raises:
        ValueError: ``opset`` is outside 11 to 18.
    """

    name = "cann"

    def __init__(self, opset: int = 11, int4_weights: bool = False) -> None:
        if not 11 <= opset <= 18:
            raise ValueError(
                f"opset must be from 11 to 18, which is what CANN's parsers take; got {opset!r}."
            )
        self.opset = opset
        self.int4_weights = int4_weights

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Our NumPy executor on the deploy model, ONNX Runtime on the fake-quant model."""
        return REFERENCE, SIMULATION

    def check_available(self) -> None:
        """Everything this exporter needs is a dependency of the package."""

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        """Write the three files, each atomically.

        Returns:
            The artifact; its notes name every layer that keeps real values, and why.

        Raises:
            UnsupportedByTarget: A quantized tensor, a bias or an operator has no form at this
                opset; all are named.
        """
        wide = any(t.qparams.grid.dtype is torch.int16 for t in model.tensors.values())
        # ONNX has 16-bit QuantizeLinear and INT4 from opset 21; none of it is left in the files.
        qdq = build_qdq(
            model,
            target=self.name,
            opset=21 if wide or self.int4_weights else OPSET,
            activation_type="int8",
            int4_weights=self.int4_weights,
        )
        files = _paths(path_prefix, path_prefix.with_name(f"{path_prefix.name}_record.txt"))
        written = self._write(qdq, files, float_bias=False)
        return Artifact(self.name, written, tuple(map(str, find_quantized(qdq).left_float)))

    def convert_onnx(
        self,
        model_file: Path,
        path_prefix: Path,
        record_file: Path | None = None,
        *,
        float_bias: bool = False,
    ) -> Conversion:
        """Write the files for a quantized ONNX model of any tool; see ``convert_qat_model``.

        Args:
            model_file: ONNX model with QuantizeLinear and DequantizeLinear.
            path_prefix: Folder and beginning of the files' names.
            record_file: Where to write the record, if at all.
            float_bias: Keep biases in float and add them after the layers.

        Raises:
            FileNotFoundError: There is no such model, or its external data is missing.
            ValueError: It is no quantized ONNX model, or nothing in it can be quantized.
            UnsupportedByTarget: Quantized parts have no form here; all are named.
            OSError: The files cannot be written.
        """
        files = _paths(path_prefix, record_file)
        source = read_onnx(model_file)
        if model_file.resolve() in {path.resolve() for path in files.values()}:
            raise ValueError(f"The files must not replace the model {str(model_file)!r} itself.")
        require_writable(files.values())
        require_quantized(source, model_file)
        qdq = canonical(source)
        found = find_quantized(qdq)
        if not found.problems and not found.layers and not found.activations:
            reasons = "".join(f"\n  {remark}" for remark in found.left_float)
            raise ValueError(
                f"Data and weight of a layer, or the inputs of a join, must be quantized; nothing "
                f"in {str(model_file)!r} is:{reasons}"
            )
        written = self._write(qdq, files, float_bias=float_bias)
        names = [layer.name for layer in found.layers]
        shifts = {f"{n}{SHIFT}": n for n in names if f"{n}{SHIFT}" in names}
        return Conversion(
            files=written,
            layers=tuple(name for name in names if name not in shifts),
            joins=joins(found),
            outputs=integer_outputs(found),
            left_float=tuple(map(str, found.left_float)),
            notes=tuple(
                f"{name!r}: its weight's zero point takes it out of int8; the layer {shift!r} adds "
                "the rest, exactly."
                for shift, name in shifts.items()
            ),
        )

    def lint(self, path: Path) -> tuple[Finding, ...]:
        """Check a deploy model against every rule that ATC is known to have.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no ONNX model.
        """
        return lint_deploy(path)

    def _write(
        self, qdq: ir.Model, files: Mapping[str, Path], *, float_bias: bool
    ) -> dict[str, Path]:
        """Write all files or none."""
        written = dict(files)
        forms = {"model": to_deploy, "fake_quant": to_fake_quant}
        try:
            with ExitStack() as stack:
                # One after the other: only one of the models is in memory, and no file takes its
                # place before all are written.
                for role, form in forms.items():
                    temporary = stack.enter_context(replacing(files[role]))
                    model = form(qdq, self.opset, float_bias=float_bias)
                    _, *weights = write_onnx(model, temporary, files[role])
                    written.update({f"{role}_weights": path for path in weights})
                    del model
                if "record" in files:
                    text = format_record(layer_records(find_quantized(qdq).layers))
                    record = stack.enter_context(replacing(files["record"]))
                    record.write_text(text, encoding="utf-8")
        except NotExpressible as error:
            problems = (Unsupported(p.name, p.reason, p.remedy) for p in error.problems)
            raise UnsupportedByTarget(self.name, tuple(problems)) from error
        return written

    def run(
        self, artifact: Artifact, runtime: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run the files on a batch; ``runtime`` is one of ``runtimes``."""
        if runtime == SIMULATION:
            return run_onnx(artifact.files["fake_quant"], inputs, optimize=False)
        executor = AscendExecutor(artifact.files["model"])
        return dict(zip(executor.output_names, executor.run(inputs), strict=True))

    def differences(self, model: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
        """Compare every number in the deploy model with the model's."""
        return deploy_differences(model, artifact.files["model"])


def _paths(prefix: Path, record: Path | None) -> dict[str, Path]:
    files = {
        role: prefix.with_name(prefix.name + suffix)
        for role, suffix in (
            ("model", "_deploy_model.onnx"),
            ("fake_quant", "_fake_quant_model.onnx"),
        )
    }
    return files if record is None else {**files, "record": record}
