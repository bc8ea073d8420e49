"""Huawei CANN: deploy ONNX with AscendQuant and AscendDequant, its simulation, its record."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch

from lightning_qat.export.convert_onnx import Conversion
from lightning_qat.export.files.inspection import Inspection
from lightning_qat.export.lint import Finding
from lightning_qat.export.protocol import Array, Artifact, CannotRun
from lightning_qat.export.trace import Trace
from lightning_qat.ir.finer_biases import with_finer_biases
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat_exporters.cann.device_nodes import device_note
from lightning_qat_exporters.cann.downgrade_opset import OPSETS
from lightning_qat_exporters.cann.executor.executor import AscendExecutor
from lightning_qat_exporters.cann.executor.trace import trace_deploy
from lightning_qat_exporters.cann.inspect import inspect_ascend
from lightning_qat_exporters.cann.lint.lint import lint_deploy
from lightning_qat_exporters.cann.normalize.normalize import normalize, with_plain_constants
from lightning_qat_exporters.cann.normalize.recognise_grid_weights import FOUND
from lightning_qat_exporters.cann.normalize.split_asymmetric_weights import SHIFT
from lightning_qat_exporters.cann.products import check_product
from lightning_qat_exporters.cann.qdq_graph.finer_biases import with_finer_layers
from lightning_qat_exporters.cann.qdq_graph.match import find_quantized, integer_outputs, joins
from lightning_qat_exporters.cann.qdq_graph.notes import coarse_biases, wide_activations
from lightning_qat_exporters.cann.qdq_graph.quantized_constants import layer_weight_bytes
from lightning_qat_exporters.cann.qdq_graph.types import (
    DEVICE_REMEDY,
    TARGET,
    IntegerRecurrent,
    QuantizedGraph,
)
from lightning_qat_exporters.cann.read_back import deploy_differences
from lightning_qat_exporters.cann.standard_operators.session import DeploySession, is_deploy
from lightning_qat_exporters.cann.standard_operators.translate import NoStandardForm
from lightning_qat_exporters.cann.write_files import WrittenFiles, file_paths, write_files
from lightning_qat_exporters.onnx_files.boundary.memory import budget_of
from lightning_qat_exporters.onnx_files.checked_run import checked_run
from lightning_qat_exporters.onnx_files.read import load_proto, read_onnx, require_quantized
from lightning_qat_exporters.onnx_files.run import OnnxSession, run_onnx
from lightning_qat_exporters.onnx_files.write import require_writable
from lightning_qat_exporters.qdq.build import INT4_GRID, OPSET, build_qdq
from lightning_qat_exporters.qdq.recurrent import with_recurrent_nodes
from lightning_qat_exporters.stored_bits import stored_in_bytes

REFERENCE = "reference executor"
STANDARD = "onnxruntime, deploy model"
SIMULATION = "onnxruntime, fake-quant model"
HALF = "reference executor, float16"
_LINTED = 2**24
"""Bytes of a file that an export still reads back to lint it."""


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
        opset: 11 to 18. All CANN versions parse 11 to 13. By default the lowest that expresses the
            model; a note says which operator needs more than 11. One that is given is kept, and
            what it cannot express is refused.
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
        product: The product, as ATC's ``--soc_version`` begins: ``Ascend310P``, ``Ascend910B``.
            Where it lacks AscendAntiQuant, tensors that joins read are rounded by float operators,
            to the same values; ``lint`` then checks for this product. By default what AMCT
            writes.
        float_bias: Keep biases in float and add them after the layers, as they were trained. By
            default they are AMCT's integers, rounded to steps of input scale times weight scale,
            which are coarse at few bits.

    Raises:
        ValueError: ``opset`` is outside 11 to 18, ``rnn`` is another word or needs integer biases,
            or ``product`` is unknown.
    """

    name = TARGET

    def __init__(
        self,
        opset: int | None = None,
        int4_weights: bool = False,
        device_fp16: bool = False,
        rnn: Literal["unrolled", "device"] = "unrolled",
        product: str | None = None,
        float_bias: bool = False,
    ) -> None:
        check_product(product)
        if opset is not None and opset not in OPSETS:
            raise ValueError(
                f"opset must be from {OPSETS[0]} to {OPSETS[-1]}, which is what CANN's parsers "
                f"take; got {opset!r}. Leave it out for the lowest that expresses the model."
            )
        if rnn not in ("unrolled", "device"):
            raise ValueError(f"rnn must be 'unrolled' or 'device'; got {rnn!r}.")
        self.opset = opset
        self.int4_weights = int4_weights
        self.device_fp16 = device_fp16
        self.rnn = rnn
        if float_bias and rnn == "device":
            raise ValueError(
                "float_bias=True needs rnn='unrolled': a device node has its biases in integers."
            )
        self.product = product
        self.float_bias = float_bias

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Our NumPy executor and ONNX Runtime on the deploy model, and on the fake-quant model."""
        half = (HALF,) if self.device_fp16 else ()
        return (REFERENCE, STANDARD, SIMULATION, *half)

    def check_available(self) -> None:
        """Everything this exporter needs is a dependency of the package."""

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        """Write the three files, each atomically.

        Returns:
            The artifact; its notes name every layer that keeps real values, and why, and every
            operator that CANN's sources do not take as the file has it.

        Raises:
            UnsupportedByTarget: A quantized tensor, a bias or an operator has no form at this
                opset; all are named.
        """
        model = self._stored(model)
        found = deploy = find_quantized(with_plain_constants(self._qdq(model)))
        calls = model.recurrences
        notes = [f"{call.name!r}: {_UNROLLED}." for call in calls]
        if self.rnn == "device" and calls:
            fused, left = with_recurrent_nodes(model)
            if len(left) < len(calls):
                deploy = find_quantized(with_plain_constants(self._qdq(fused)), recurrent=True)
            notes = [*map(str, left), *_device_notes(deploy.recurrent)]
        files = file_paths(path_prefix, path_prefix.with_name(f"{path_prefix.name}_record.txt"))
        # AMCT's own simulation of a recurrent node rounds the hidden state once; ours at each step.
        written = write_files(
            deploy, found, files, self.opset, float_bias=self.float_bias, product=self.product
        )
        notes += wide_activations(deploy)
        notes += () if self.float_bias else coarse_biases(deploy)
        notes = [*written.notes, *map(str, found.left_float), *notes]
        notes += self._refused(written.files["model"])
        return Artifact(self.name, written.files, tuple(notes), _integer_weights(model, deploy))

    def _stored(self, model: QuantizedModel) -> QuantizedModel:
        """The model with the integers that the file has."""
        return with_finer_biases(model, keep=self._packed)

    @property
    def _packed(self) -> IntegerGrid | None:
        """The grid of weights that are stored two to a byte."""
        return INT4_GRID if self.int4_weights else None

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
        grid_weights: bool = False,
        max_bytes: int | None = None,
    ) -> Conversion:
        """Write the files for a quantized ONNX model of any tool; see ``convert_qat_model``.

        Args:
            model_file: ONNX model with QuantizeLinear and DequantizeLinear.
            path_prefix: Folder and beginning of the files' names.
            record_file: Where to write the record, if at all.
            float_bias: As the option of the exporter.
            grid_weights: Take float weights that lie on a grid as integers.
            max_bytes: Most bytes that the model's tensors may take in memory.

        Raises:
            FileNotFoundError: There is no such model, or its external data is missing.
            ValueError: It is no quantized ONNX model, or nothing in it can be quantized.
            UnsupportedByTarget: Quantized parts have no form here; all are named.
            OSError: The files cannot be written.
        """
        files = file_paths(path_prefix, record_file)
        with _collector_paused():
            source = read_onnx(model_file, max_bytes=max_bytes)
            if model_file.resolve() in {path.resolve() for path in files.values()}:
                raise ValueError(
                    f"The files must not replace the model {str(model_file)!r} itself."
                )
            require_writable(files.values())
            require_quantized(source, model_file)
            float_bias = float_bias or self.float_bias
            # A device node has its biases in integers.
            recurrent = self.rnn == "device" and not float_bias
            budget = budget_of(source)
            plain = normalize(source, grid_weights=grid_weights, budget=budget)
            budget.take(layer_weight_bytes(plain), "a weight of its own for each layer")
            found = find_quantized(plain, recurrent=recurrent)
            if not float_bias:
                found = with_finer_layers(found)
            _require_something_quantized(found, model_file)
            written = write_files(
                found, found, files, self.opset, float_bias=float_bias, product=self.product
            )
            refused = self._refused(written.files["model"])
            return _conversion(found, written, refused, float_bias=float_bias)

    def lint(self, path: str | Path) -> tuple[Finding, ...]:
        """Check a deploy model against every rule that ATC is known to have.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no ONNX model.
        """
        return lint_deploy(Path(path), self.product)

    def _refused(self, path: Path) -> tuple[str, ...]:
        """Errors that lint finds in a file of our own: what the model has, and CANN does not."""
        if path.stat().st_size > _LINTED:
            # Reading it takes twice its size, beside the model that it was written from.
            return (
                f"Too large to be checked against CANN's rules beside the model: lightning-qat "
                f"lint {path} does it.",
            )
        return tuple(
            f"{finding.node!r}: CANN does not take it: {finding.must}; got {finding.got}. "
            f"{finding.remedy}."
            for finding in self.lint(path)
            # 16 bits have a note of their own.
            if finding.severity == "error" and "INT16" not in finding.got
        )

    def run(
        self, artifact: Artifact, runtime: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run the files on a batch; ``runtime`` is one of ``runtimes``.

        Raises:
            CannotRun: The deploy model has no form in standard operators.
        """
        if runtime == SIMULATION:
            if "fake_quant" not in artifact.files:
                raise CannotRun(runtime, "it is not beside the deploy model")
            return run_onnx(artifact.files["fake_quant"], inputs, optimize=False)
        if runtime == STANDARD:
            try:
                session = DeploySession(artifact.files["model"])
            except NoStandardForm as error:
                raise CannotRun(runtime, str(error)) from error
            return session.run(inputs)
        executor = AscendExecutor(artifact.files["model"], device_fp16=runtime == HALF)
        return dict(zip(executor.output_names, executor.run(inputs), strict=True))

    @property
    def traced_runtime(self) -> str:
        """The reference executor, on the deploy model."""
        return REFERENCE

    def trace(
        self,
        artifact: Artifact,
        inputs: Mapping[str, Array],
        given: Mapping[str, Array] | None = None,
    ) -> Trace:
        """Run the deploy model and show what every AscendQuant writes."""
        return trace_deploy(artifact.files["model"], self.traced_runtime, inputs, given or {})

    def run_file(self, path: str | Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run an ONNX file of anyone in ONNX Runtime: outputs by name.

        A deploy model is rewritten as standard operators, with exact products of integers; another
        file is computed as it is written, without ONNX Runtime's graph optimizations.

        Args:
            path: A deploy, QDQ or float model.
            inputs: Arrays by input name.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It cannot be run, or names, types or shapes of the inputs are not its own;
                everything that is wrong is named. A tensor to quantize holds NaN, or an accumulator
                leaves int32.
        """
        path = Path(path)
        deploy = is_deploy(load_proto(path))
        return checked_run(
            path,
            lambda: DeploySession(path) if deploy else OnnxSession(path, optimize=False),
            inputs,
        )

    def inspect(self, path: Path) -> Inspection | None:
        """What is in a deploy or fake-quant model; ``None``: it is another file."""
        return inspect_ascend(path) if path.suffix == ".onnx" else None

    def artifact_of(self, path: Path) -> Artifact | None:
        """A deploy model with its fake-quant model, by the path of either; ``None``: neither."""
        if path.suffix != ".onnx":
            return None
        prefix = path
        for role in ("_deploy_model", "_fake_quant_model"):
            prefix = prefix.with_name(prefix.stem.removesuffix(role) + prefix.suffix)
        files = {r: f for r, f in file_paths(prefix.with_suffix(""), None).items() if f.is_file()}
        if path not in files.values():
            files = {"model": path}
        if "model" not in files or not is_deploy(load_proto(files["model"])):
            return None
        return Artifact(self.name, files)

    def cautions(self, model: QuantizedModel) -> tuple[str, ...]:
        """Say before training that few bits take 8."""
        remedy = "int4_weights=True packs weights of 4 bits."
        return tuple(stored_in_bytes(model, packed=self._packed, remedy=remedy))

    def differences(self, model: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
        """Compare every number in the deploy model with the model's."""
        return deploy_differences(self._stored(model), artifact.files["model"])


def _integer_weights(model: QuantizedModel, found: QuantizedGraph) -> frozenset[str]:
    """The weights of integer layers; joins read real values, which AscendAntiQuant gives them."""
    names = {layer.name for layer in found.layers} | {layer.name for layer in found.recurrent}
    calls: Counter[str] = Counter()
    keys = set()
    for layer in model.layers:
        name = f"{layer.name}_{calls[layer.name]}" if calls[layer.name] else layer.name
        calls[layer.name] += 1
        if names & {name or "layer", layer.name}:
            keys.add(layer.weight_key)
    return frozenset(keys)


_UNROLLED = (
    "its steps are unrolled into integer matrix products with float gates between them; "
    f"{DEVICE_REMEDY}"
)


def _device_notes(layers: Sequence[IntegerRecurrent]) -> list[str]:
    """Notes on device nodes, each a warning as well: it is easily overlooked."""
    notes = [device_note(layer) for layer in layers]
    for note in notes:
        warnings.warn(note, stacklevel=4)
    return notes


def _grid_notes(found: QuantizedGraph) -> list[str]:
    layers = found.model.meta.get(FOUND, ())
    return [
        f"{name!r}: its float weight lies on a grid and was taken as integers." for name in layers
    ]


def _require_something_quantized(found: QuantizedGraph, model_file: Path) -> None:
    if not found.problems and not found.layers and not found.activations:
        reasons = "".join(f"\n  {remark}" for remark in found.left_float)
        raise ValueError(
            f"Data and weight of a layer, or the inputs of a join, must be quantized; nothing "
            f"in {str(model_file)!r} is:{reasons}"
        )


def _conversion(
    found: QuantizedGraph,
    written: WrittenFiles,
    refused: Sequence[str],
    *,
    float_bias: bool,
) -> Conversion:
    names = [layer.name for layer in found.layers] + [layer.name for layer in found.recurrent]
    taken = set(names)
    shifts = {f"{name}{SHIFT}": name for name in names if f"{name}{SHIFT}" in taken}
    shift_notes = (
        f"{name!r}: its weight's zero point takes it out of int8; the layer {shift!r} adds the "
        "rest, exactly."
        for shift, name in shifts.items()
    )
    return Conversion(
        files=written.files,
        layers=tuple(name for name in names if name not in shifts),
        joins=tuple(name for name in joins(found) if name not in taken),
        outputs=integer_outputs(found),
        left_float=tuple(map(str, found.left_float)),
        notes=(
            *written.notes,
            *_grid_notes(found),
            *shift_notes,
            *_device_notes(found.recurrent),
            *wide_activations(found),
            *refused,
            *(() if float_bias else coarse_biases(found)),
        ),
    )


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector, in the whole process, while a model is converted.

    A model of thousands of nodes makes so many objects that the collector runs all the time, and
    each full run walks all of torch's objects. Nothing is lost: reference counts still free what
    has no cycles, and the collector runs again afterwards. Other threads see it paused, too.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
