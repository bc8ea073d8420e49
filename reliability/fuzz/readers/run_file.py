"""Deploy files, as `lightning-qat run` computes them: in ONNX Runtime, by standard operators."""

from pathlib import Path

from lightning_qat_exporters import CannExporter
from reliability.fuzz.reader import Reader
from reliability.fuzz.readers.executor import arrays_for, mutate, seeds


def read(path: Path) -> None:
    """Compute the model on arrays of the sizes that it declares."""
    try:
        inputs = arrays_for(path)
    except Exception:  # onnx's: it is no model, which the run says as well
        inputs = {}
    CannExporter().run_file(path, inputs)


READER = Reader("run_file", seeds, mutate, read, (ValueError, FileNotFoundError))
