"""Huawei CANN: deploy ONNX with AscendQuant and AscendDequant, its simulation, its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lightning_qat.atomic import replacing
from lightning_qat.export import Array, Artifact, Unsupported, UnsupportedByTarget
from lightning_qat.quantized_model import QuantizedModel
from lightning_qat_exporters._ascend import to_deploy, to_fake_quant
from lightning_qat_exporters._ascend_executor import AscendExecutor
from lightning_qat_exporters._deploy_differences import deploy_differences
from lightning_qat_exporters._files import save_onnx
from lightning_qat_exporters._qdq import build_qdq
from lightning_qat_exporters._quantized_ops import NotExpressible, find_quantized
from lightning_qat_exporters._record import format_record, layer_records
from lightning_qat_exporters._runtime import run_onnx

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
            opset=21 if wide or self.int4_weights else 18,
            activation_type="int8",
            int4_weights=self.int4_weights,
        )
        try:
            deploy = to_deploy(qdq, self.opset)
            simulation = to_fake_quant(qdq, self.opset)
        except NotExpressible as error:
            problems = (Unsupported(p.name, p.reason, p.remedy) for p in error.problems)
            raise UnsupportedByTarget(self.name, tuple(problems)) from error
        found = find_quantized(qdq)
        files = {
            role: path_prefix.with_name(path_prefix.name + suffix)
            for role, suffix in (
                ("model", "_deploy_model.onnx"),
                ("fake_quant", "_fake_quant_model.onnx"),
                ("record", "_record.txt"),
            )
        }
        for role, onnx_model in (("model", deploy), ("fake_quant", simulation)):
            _, *weights = save_onnx(onnx_model, files[role])
            files.update({f"{role}_weights": path for path in weights})
        with replacing(files["record"]) as temporary:
            temporary.write_text(format_record(layer_records(found.layers)), encoding="utf-8")
        return Artifact(self.name, files, tuple(map(str, found.left_float)))

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
