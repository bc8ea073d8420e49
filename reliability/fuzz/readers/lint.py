"""Deploy models and QDQ models, as `lightning-qat lint` and `lightning-qat inspect` read them."""

from contextlib import suppress
from pathlib import Path

from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter
from reliability.fuzz.reader import Reader
from reliability.fuzz.readers.onnx_files import mutate_onnx, write_deploy, write_qdq


def _seeds(folder: Path) -> list[Path]:
    qdq = write_qdq(folder)
    return [*qdq, *write_deploy(folder, qdq)]


def _read(path: Path) -> None:
    for finding in CannExporter(product="Ascend310B").lint(path):
        str(finding)
    with suppress(ValueError):  # of a deploy model
        FakeQuantOnnxExporter(for_runtime="tensorrt").lint(path)
    CannExporter().inspect(path)
    FakeQuantOnnxExporter().inspect(path)


READER = Reader("lint", _seeds, mutate_onnx, _read, (ValueError, FileNotFoundError))
