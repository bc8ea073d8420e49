"""Huawei CANN: deploy ONNX with AscendQuant and AscendDequant, its simulation, its record."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch

from lightning_qat.amct.record import BINARY_SUFFIX, encode_record, format_record
from lightning_qat.atomic_write import replacing
from lightning_qat.export.convert_onnx import Conversion
from lightning_qat.export.lint import Finding
from lightning_qat.export.protocol import Array, Artifact, Unsupported, UnsupportedByTarget
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.cann.deploy import to_deploy
from lightning_qat_exporters.cann.executor.executor import AscendExecutor
from lightning_qat_exporters.cann.fake_quant import to_fake_quant
from lightning_qat_exporters.cann.layer_records import layer_records
from lightning_qat_exporters.cann.lint.lint import lint_deploy
from lightning_qat_exporters.cann.normalize.normalize import canonical
from lightning_qat_exporters.cann.normalize.split_asymmetric_weights import SHIFT
from lightning_qat_exporters.cann.qdq_graph.match import find_quantized, integer_outputs, joins
from lightning_qat_exporters.cann.qdq_graph.types import (
    DEVICE_REMEDY,
    NotExpressible,
    QuantizedGraph,
)
from lightning_qat_exporters.cann.read_back import deploy_differences
from lightning_qat_exporters.cann.recurrent_nodes import QuantizedRecurrent, find_recurrent
from lightning_qat_exporters.onnx_files.read import read_onnx, require_quantized
from lightning_qat_exporters.onnx_files.run import run_onnx
from lightning_qat_exporters.onnx_files.write import require_writable, write_onnx
from lightning_qat_exporters.qdq.build import OPSET, build_qdq
from lightning_qat_exporters.qdq.recurrent import with_recurrent_nodes

REFERENCE = "reference executor"
SIMULATION = "onnxruntime, fake-quant model"
HALF = "reference executor, float16"


class CannExporter:
    """Writes what ATC takes for an Ascend device, in the format of Huawei AMCT.

    ``<prefix>_deploy_model.onnx``: integer weights and biases between AscendQuant and
    AscendDequant, for ATC. ``<prefix>_fake_quant_model.onnx``: the same numbers in standard float
    operators, for ONNX Runtime; exact while an accumulator stays below 2**24.
    ``<prefix>_record.txt``: AMCT's record of scales and offsets.

    No Ascend device or ATC was available to its authors: the format is compared with files that
    AMCT wrote, the arithmetic with AMCT's own simulation. Many device kernels quantize in float16,
    so the last bit of a device cannot be promised; ``device_fp16`` shows what that may cost.

    Args:
        opset: 11 to 18. All CANN versions parse 11; use more only where an operator needs it.
        int4_weights: Pack weights of 4 bits two to a byte, as AMCT does, for the products that
            compute with them (Atlas inference products). Otherwise they are bytes, which every
            product takes. Layers with groups or an odd number of input channels stay bytes.
        device_fp16: Let ``verify`` also run the deploy model as kernels do that quantize in
            float16. Files are the same.
        rnn: ``unrolled``: LSTM and GRU are integer matrix products and float gates, step by step.
            ``device``: one node ``BasicLSTMInplaceFillWindowCache`` or
            ``BasicGRUInplaceFillWindowCache`` where one fits, as AMCT writes them. Best effort: no
            current product supports them by Huawei's documents, and kernels require a sequence
            length of 1; notes and a warning say so for each layer. Layers with several directions,
            layers or a projection stay unrolled.

    Raises:
        ValueError: ``opset`` is outside 11 to 18, or ``rnn`` is another word.
    """

    name = "cann"

    def __init__(
        self,
        opset: int = 11,
        int4_weights: bool = False,
        device_fp16: bool = False,
        rnn: Literal["unrolled", "device"] = "unrolled",
    ) -> None:
        if not 11 <= opset <= 18:
            raise ValueError(
                f"opset must be from 11 to 18, which is what CANN's parsers take; got {opset!r}."
            )
        if rnn not in ("unrolled", "device"):
            raise ValueError(f"rnn must be 'unrolled' or 'device'; got {rnn!r}.")
        self.opset = opset
        self.int4_weights = int4_weights
        self.device_fp16 = device_fp16
        self.rnn = rnn

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Our NumPy executor on the deploy model, ONNX Runtime on the fake-quant model."""
        return (REFERENCE, SIMULATION, HALF) if self.device_fp16 else (REFERENCE, SIMULATION)

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
        unrolled = self._qdq(model)
        notes = [f"{call.name!r}: {_UNROLLED}." for call in model.recurrences]
        folded = unrolled
        if self.rnn == "device" and notes:
            fused, left = with_recurrent_nodes(model)
            if len(left) < len(notes):
                folded = self._qdq(fused)
            notes = [f"{layer.layer!r}: {layer.reason}. {layer.remedy}." for layer in left]
            notes += _device_notes(find_recurrent(folded)[0])
        files = _paths(path_prefix, path_prefix.with_name(f"{path_prefix.name}_record.txt"))
        # AMCT's own simulation of a recurrent node rounds the hidden state once; ours at each step.
        found = find_quantized(unrolled)
        written = self._write(
            folded,
            unrolled,
            found if folded is unrolled else find_quantized(folded),
            files,
            float_bias=False,
        )
        return Artifact(self.name, written, (*map(str, found.left_float), *notes))

    def _qdq(self, model: QuantizedModel) -> ir.Model:
        wide = any(t.qparams.grid.dtype is torch.int16 for t in model.tensors.values())
        # ONNX has 16-bit QuantizeLinear and INT4 from opset 21; none of it is left in the files.
        return build_qdq(
            model,
            target=self.name,
            opset=21 if wide or self.int4_weights else OPSET,
            activation_type="int8",
            int4_weights=self.int4_weights,
        )

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
        with _collector_paused():
            return self._converted(
                model_file, _paths(path_prefix, record_file), float_bias=float_bias
            )

    def _converted(
        self, model_file: Path, files: Mapping[str, Path], *, float_bias: bool
    ) -> Conversion:
        source = read_onnx(model_file)
        if model_file.resolve() in {path.resolve() for path in files.values()}:
            raise ValueError(f"The files must not replace the model {str(model_file)!r} itself.")
        require_writable(files.values())
        require_quantized(source, model_file)
        qdq = canonical(source)
        found = find_quantized(qdq)
        left_float = found.left_float
        recurrent: tuple[QuantizedRecurrent, ...] = ()
        if self._writes_recurrent(float_bias):
            recurrent, left = find_recurrent(qdq, found)
            told = {layer.name for layer in recurrent} | {remark.name for remark in left}
            left_float = (*(r for r in left_float if r.name not in told), *left)
        if not found.problems and not found.layers and not found.activations:
            reasons = "".join(f"\n  {remark}" for remark in left_float)
            raise ValueError(
                f"Data and weight of a layer, or the inputs of a join, must be quantized; nothing "
                f"in {str(model_file)!r} is:{reasons}"
            )
        written = self._write(qdq, qdq, found, files, float_bias=float_bias)
        names = [layer.name for layer in found.layers] + [layer.name for layer in recurrent]
        shifts = {f"{n}{SHIFT}": n for n in names if f"{n}{SHIFT}" in names}
        return Conversion(
            files=written,
            layers=tuple(name for name in names if name not in shifts),
            joins=tuple(name for name in joins(found) if name not in names),
            outputs=integer_outputs(found),
            left_float=tuple(map(str, left_float)),
            notes=(
                *(
                    f"{name!r}: its weight's zero point takes it out of int8; the layer {shift!r} "
                    "adds the rest, exactly."
                    for shift, name in shifts.items()
                ),
                *_device_notes(recurrent),
            ),
        )

    def lint(self, path: Path) -> tuple[Finding, ...]:
        """Check a deploy model against every rule that ATC is known to have.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no ONNX model.
        """
        return lint_deploy(path)

    def _writes_recurrent(self, float_bias: bool) -> bool:
        # A device node has its biases in integers.
        return self.rnn == "device" and not float_bias

    def _write(
        self,
        deploy: ir.Model,
        simulated: ir.Model,
        found: QuantizedGraph,
        files: Mapping[str, Path],
        *,
        float_bias: bool,
    ) -> dict[str, Path]:
        """Write all files or none."""
        recurrent = self._writes_recurrent(float_bias)
        forms = {"model": (to_deploy, deploy), "fake_quant": (to_fake_quant, simulated)}
        written = dict(files)
        try:
            with ExitStack() as stack:
                # One after the other: only one of the models is in memory, and no file takes its
                # place before all are written.
                for role, (form, source) in forms.items():
                    temporary = stack.enter_context(replacing(files[role]))
                    model = form(source, self.opset, float_bias=float_bias, recurrent=recurrent)
                    _, *weights = write_onnx(model, temporary, files[role])
                    written.update({f"{role}_weights": path for path in weights})
                    del model
                if "record" in files:
                    nodes, _ = find_recurrent(deploy, found) if recurrent else ((), ())
                    records = layer_records(found.layers, nodes)
                    if files["record"].suffix == BINARY_SUFFIX:
                        data = encode_record(records)
                    else:
                        data = format_record(records).encode()
                    stack.enter_context(replacing(files["record"])).write_bytes(data)
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
        executor = AscendExecutor(artifact.files["model"], device_fp16=runtime == HALF)
        return dict(zip(executor.output_names, executor.run(inputs), strict=True))

    def differences(self, model: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
        """Compare every number in the deploy model with the model's."""
        return deploy_differences(model, artifact.files["model"])


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python's collector from walking all of torch's objects for every few hundred nodes."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


_UNROLLED = (
    "its steps are unrolled into integer matrix products with float gates between them; "
    f"{DEVICE_REMEDY}"
)


def _device_notes(layers: Iterable[QuantizedRecurrent]) -> tuple[str, ...]:
    """What must be known of device nodes; a warning as well, for it is easily overlooked."""
    notes = tuple(layer.note for layer in layers)
    for note in notes:
        warnings.warn(note, stacklevel=4)
    return notes


def _paths(prefix: Path, record: Path | None) -> dict[str, Path]:
    files = {
        role: prefix.with_name(prefix.name + suffix)
        for role, suffix in (
            ("model", "_deploy_model.onnx"),
            ("fake_quant", "_fake_quant_model.onnx"),
        )
    }
    return files if record is None else {**files, "record": record}
