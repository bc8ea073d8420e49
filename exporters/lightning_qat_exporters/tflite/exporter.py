"""TFLite: integer files for LiteRT on Android, iOS, microcontrollers and Edge TPUs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from lightning_qat.atomic_write import replacing
from lightning_qat.export.files.inspection import Inspection
from lightning_qat.export.protocol import (
    Array,
    Artifact,
    CannotRun,
    MissingDependency,
    Unsupported,
    UnsupportedByTarget,
)
from lightning_qat.export.trace import Trace
from lightning_qat.ir.finer_biases import with_finer_biases
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.stored_bits import stored_in_bytes
from lightning_qat_exporters.tflite.decompose.sample import later_batch_axes
from lightning_qat_exporters.tflite.flatbuffer.bias_types import widen_biases
from lightning_qat_exporters.tflite.flatbuffer.exact_biases import store_biases
from lightning_qat_exporters.tflite.flatbuffer.file import pack, read, view
from lightning_qat_exporters.tflite.flatbuffer.int8_constants import store_integers
from lightning_qat_exporters.tflite.flatbuffer.io_types import give_types
from lightning_qat_exporters.tflite.flatbuffer.kernel_limits import (
    operators_that_abort,
    places_of_failure,
)
from lightning_qat_exporters.tflite.flatbuffer.match_layers import match_layers
from lightning_qat_exporters.tflite.inspect import inspect_tflite
from lightning_qat_exporters.tflite.integer_keys import integer_keys
from lightning_qat_exporters.tflite.litert import backend as litert_backend
from lightning_qat_exporters.tflite.metadata import describe, sign
from lightning_qat_exporters.tflite.notes import notes_on
from lightning_qat_exporters.tflite.read_back import tflite_differences
from lightning_qat_exporters.tflite.run import RUNTIMES, check_runs, run
from lightning_qat_exporters.tflite.tinynn import backend as tinynn_backend
from lightning_qat_exporters.tflite.trace import trace_tflite
from lightning_qat_exporters.tflite.unsupported import problems_of

BackendName = Literal["auto", "tinynn", "litert"]
IO = Literal["float", "int8", "uint8"]
Granularity = Literal["per_channel", "per_tensor"]
Layout = Literal["nhwc", "nchw"]


class Backend(Protocol):
    """A module that turns a converted model into an unpacked file."""

    def check_available(self) -> None:
        """Raise ``MissingDependency`` when a package is missing."""

    def convert(self, model: QuantizedModel, *, io: str, layout: str) -> Any:
        """Convert; raise ``UnsupportedByTarget`` with everything that cannot be expressed."""
        ...


class TFLiteExporter:
    """Writes ``<prefix>.tflite`` with the integers and scales of the model, to the bit.

    An operator is computed in integers if the recipe quantized its inputs and its output; all
    others are computed in float behind DEQUANTIZE, and the artifact's notes name them. The file
    takes one sample at a time if the model's batch is dynamic, because delegates and
    microcontrollers need fixed shapes.

    Args:
        backend: ``tinynn`` is TinyNeuralNetwork, ``litert`` Google's litert-torch; ``auto`` takes
            the first of the two that is installed.
        io: Type of quantized inputs and outputs in the file: ``float`` puts QUANTIZE and DEQUANTIZE
            at its ends, ``int8`` and ``uint8`` leave the integers to the caller.
        weight_granularity_linear: ``per_tensor`` refuses Linear layers whose weight has a scale
            per channel, which TFLite-Micro does not run. It never rounds a weight anew.
        layout: Layout of 4-D inputs and outputs: ``nhwc`` is LiteRT's, ``nchw`` torch's.

    Raises:
        ValueError: An option is none of these.
    """

    name = "tflite"

    def __init__(
        self,
        backend: BackendName = "auto",
        io: IO = "float",
        weight_granularity_linear: Granularity = "per_channel",
        layout: Layout = "nhwc",
    ) -> None:
        for option, value, choices in (
            ("backend", backend, get_args(BackendName)),
            ("io", io, get_args(IO)),
            ("weight_granularity_linear", weight_granularity_linear, get_args(Granularity)),
            ("layout", layout, get_args(Layout)),
        ):
            if value not in choices:
                raise ValueError(f"{option} must be one of {choices}; got {value!r}.")
        self.backend: BackendName = backend
        self.io: IO = io
        self.weight_granularity_linear: Granularity = weight_granularity_linear
        self.layout: Layout = layout

    @property
    def runtimes(self) -> tuple[str, ...]:
        """LiteRT with each of its sets of kernels; XNNPACK is what runs by default."""
        return tuple(RUNTIMES)

    def check_available(self) -> None:
        """Check that the backend is installed.

        Raises:
            MissingDependency: It is not installed, or with ``auto`` none of the two.
        """
        self._choose()

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        """Write ``<prefix>.tflite``, atomically.

        Returns:
            The artifact; its notes name every layer and function that is computed in float.

        Raises:
            MissingDependency: As ``check_available``.
            UnsupportedByTarget: The file cannot express parts of the model; the error names them.
        """
        self._refuse(
            problems_of(model, linear_per_tensor=self.weight_granularity_linear == "per_tensor")
        )
        backend_name, backend = self._choose()
        model = with_finer_biases(model)
        file = backend.convert(model, io=self.io, layout=self.layout)
        sign(file, model.input_names, model.output_names)
        layers = store_integers(file, model, match_layers(view(file), model))
        store_biases(file, model, layers)
        self._refuse(give_types(file, self.io))
        widen_biases(file)
        describe(
            file,
            layers,
            backend=backend_name,
            layout=self.layout,
            batch_axes=later_batch_axes(model),
        )
        written = view(file)
        self._refuse(tuple(operators_that_abort(written)))
        content = pack(file)
        failure = check_runs(content)
        if failure is not None:
            self._refuse(
                tuple(
                    Unsupported(
                        place,
                        f"LiteRT cannot prepare the file that {backend_name} wrote: {failure}",
                        "Replace that operator, or leave its inputs or output float (exclude)",
                    )
                    for place in places_of_failure(written, failure) or ("the model",)
                )
            )
        path = path_prefix.with_name(f"{path_prefix.name}.tflite")
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        notes = notes_on(model, written, layers)
        return Artifact(self.name, {"model": path}, notes, integer_keys(model, written, layers))

    def run(
        self, artifact: Artifact, runtime: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Run the file on a batch; ``runtime`` is one of ``runtimes``.

        Raises:
            CannotRun: LiteRT's reference kernels lack an operator of the file, such as ELU.
        """
        content = artifact.files["model"].read_bytes()
        try:
            return run(content, RUNTIMES[runtime], inputs)
        except ValueError as error:
            if "Didn't find op" not in str(error):
                raise
            raise CannotRun(runtime, str(error)) from error

    @property
    def traced_runtime(self) -> str:
        """XNNPACK, which rounds as torch does."""
        return next(iter(RUNTIMES))

    def trace(
        self,
        artifact: Artifact,
        inputs: Mapping[str, Array],
        given: Mapping[str, Array] | None = None,
    ) -> Trace:
        """Run the file, sample by sample, and show every integer tensor that it computes."""
        content = artifact.files["model"].read_bytes()
        return trace_tflite(content, RUNTIMES[self.traced_runtime], inputs, given or {})

    def cautions(self, model: QuantizedModel) -> tuple[str, ...]:
        """Say before training that few bits take 8."""
        return tuple(stored_in_bytes(model))

    def explain(self, max_steps: Mapping[str, float]) -> tuple[str, ...]:
        """Explain a difference of LiteRT's own kernels that is larger than that of XNNPACK."""
        xnnpack, *others = (max_steps[runtime] for runtime in RUNTIMES if runtime in max_steps)
        if not others or max(others) <= 2 or max(others) <= 2 * xnnpack:
            return ()
        return (
            f"{max(others):.3g} steps with LiteRT's own kernels: they round an accumulator twice "
            "and a mean downwards, XNNPACK rounds once. Devices where XNNPACK runs (Android, iOS, "
            "Linux) compute what it does; microcontrollers compute what the reference kernels do.",
        )

    def inspect(self, path: Path) -> Inspection | None:
        """What a TFLite file of anyone holds; ``None``: it is no TFLite file."""
        return None if self.artifact_of(path) is None else inspect_tflite(path)

    def artifact_of(self, path: Path) -> Artifact | None:
        """A TFLite file of anyone as an artifact; ``None``: it is no TFLite file."""
        with path.open("rb") as file:
            is_tflite = file.read(8)[4:] == b"TFL3"
        return Artifact(self.name, {"model": path}) if is_tflite else None

    def differences(self, model: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
        """Compare every number in the file with the model's: integers, scales, biases."""
        path = artifact.files["model"]
        try:
            return tflite_differences(with_finer_biases(model), read(path.read_bytes()))
        except (ValueError, LookupError, RuntimeError) as error:  # sizes that do not fit, too few
            raise ValueError(f"{str(path)!r} must be a whole TFLite file: {error}") from error

    def _refuse(self, problems: tuple[Unsupported, ...]) -> None:
        if problems:
            raise UnsupportedByTarget(self.name, problems)

    def _choose(self) -> tuple[str, Backend]:
        wanted = ("tinynn", "litert") if self.backend == "auto" else (self.backend,)
        missing: list[str] = []
        for name in wanted:
            try:
                backend = _BACKENDS[name]
                backend.check_available()
            except MissingDependency as error:
                missing.append(str(error))
            else:
                return name, backend
        raise MissingDependency(
            missing[0]
            if len(missing) == 1
            else "TFLite export needs one of two backends. " + " Or: ".join(missing)
        )


_BACKENDS: Mapping[str, Backend] = {"tinynn": tinynn_backend, "litert": litert_backend}
