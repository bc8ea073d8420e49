"""Quantized ONNX models of any tool, as `lightning-qat convert` reads them."""

from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_qat.export.convert_onnx import convert_qat_model
from reliability.fuzz.reader import Reader
from reliability.fuzz.readers.onnx_files import mutate_onnx, write_qdq


def _read(path: Path) -> None:
    with TemporaryDirectory(dir=path.parent) as folder:
        prefix = Path(folder) / "net"
        convert_qat_model(path, prefix, prefix.with_suffix(".txt"), grid_weights=True)


READER = Reader("convert", write_qdq, mutate_onnx, _read, (ValueError, FileNotFoundError))
