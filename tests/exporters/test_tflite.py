"""The TFLite file: integers and scales as they are, run by LiteRT."""

from pathlib import Path

import pytest

from lightning_qat.export import Artifact
from lightning_qat_exporters import TFLiteExporter
from lightning_qat_exporters._tflite_file import read
from tests.exporters.contract import ExporterContract

pytest.importorskip("litert_torch")


class TestContract(ExporterContract):
    name = "tflite"
    make = TFLiteExporter
    most_steps = 1.0 + 1e-5  # a step, and the rounding of float32

    def break_write(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def half(path: Path, content: bytes) -> None:
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_bytes", half)

    def names_in(self, artifact: Artifact) -> set[str]:
        file = read(artifact.files["model"].read_bytes())
        return {file.tensors[op.outputs[0]].name for op in file.operators}
