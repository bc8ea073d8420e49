"""ONNX Runtime's default session, with integer sums that no CPU lets saturate."""

from collections.abc import Mapping

import onnxruntime as ort

from lightning_qat.export.protocol import Array, Artifact
from lightning_qat_exporters import FakeQuantOnnxExporter


class ExactSums(FakeQuantOnnxExporter):
    """Runs its files in integers as they are meant: every product is added exactly.

    On x86 without VNNI instructions the default session adds pairs of uint8 x int8 products in 16
    bits, which saturate; ``explain`` says so to users, and no file can change it. A session option
    makes it take kernels that do not. It does nothing on CPUs whose kernels add exactly anyway
    (VNNI, ARM): there, what is tested is the default session itself.
    """

    @property
    def runtimes(self) -> tuple[str, ...]:
        """ONNX Runtime's, whatever else is installed."""
        return super().runtimes[:2]

    def run(
        self, artifact: Artifact, runtime: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        literal, _ = self.runtimes
        if runtime == literal:
            return super().run(artifact, runtime, inputs)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = ort.InferenceSession(
            str(artifact.files["model"]), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
