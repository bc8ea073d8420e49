"""Scales with which LiteRT's integer kernels would end the whole process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.protocol import UnsupportedByTarget
from lightning_qat.export.verify import verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat_exporters import TFLiteExporter
from lightning_qat_exporters.tflite import exporter as exporter_module
from lightning_qat_exporters.tflite.flatbuffer.file import (
    FileOperator,
    FileTensor,
    TFLiteFile,
    read,
)
from lightning_qat_exporters.tflite.flatbuffer.kernel_limits import broken_limit, places_of_failure
from lightning_qat_exporters.tflite.litert import requantize
from tests.exporters.tflite.limit_networks import (
    LargeConstantCancelled,
    TinyScores,
    ZerosAdded,
)

pytest.importorskip("litert_torch")
pytestmark = pytest.mark.xdist_group("tflite")


NETWORKS: dict[str, tuple[type[nn.Module], str]] = {
    "scores near zero": (TinyScores, "SOFTMAX"),
    "zeros for every sample": (ZerosAdded, "ADD"),
}


def _ends(content: bytes, folder: Path) -> bool:
    """Whether a process that prepares a file with LiteRT's reference kernels is aborted."""
    (folder / "net.tflite").write_bytes(content)
    code = (
        "from ai_edge_litert.interpreter import Interpreter, OpResolverType\n"
        f"Interpreter({str(folder / 'net.tflite')!r}, "
        "experimental_op_resolver_type=OpResolverType.BUILTIN_REF).allocate_tensors()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    return run.returncode != 0


def _converted(network: type[nn.Module], x: Tensor) -> QuantizedModel:
    torch.manual_seed(0)
    model = network()
    prepare(model)
    # Ranges are observed and nothing is learned, so the numbers stay as small as they are.
    model.train()(x)
    return convert(model.eval(), x)


@pytest.mark.parametrize(("network", "kind"), NETWORKS.values(), ids=NETWORKS)
def test_an_operator_whose_kernel_would_abort_is_not_integer_and_says_why(
    network: type[nn.Module], kind: str, tmp_path: Path
) -> None:
    x = torch.randn(4, 8)
    quantized = _converted(network, x)
    exporter = TFLiteExporter(backend="litert")
    artifact = export(quantized, exporter, tmp_path / "net")
    file = read(artifact.files["model"].read_bytes())
    in_float = [operator.kind for operator in file.float_operators]
    assert [op.kind for op in file.operators].count(kind) == in_float.count(kind)
    notes = [note for note in artifact.notes if note.startswith("SOFTMAX behind 'before': ")]
    # The converter leaves a sum with zeros out once it is in float.
    assert len(notes) == (kind == "SOFTMAX")
    assert all("integer kernel would end the process" in note for note in notes)
    agreement = verify(quantized, artifact, (x,), exporter)
    assert agreement.parameters_equal
    assert all(runtime.max_steps <= 1 for runtime in agreement.runtimes)


@pytest.mark.parametrize(("network", "kind"), NETWORKS.values(), ids=NETWORKS)
def test_a_file_that_would_abort_is_refused_before_a_runtime_sees_it(
    network: type[nn.Module], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = _converted(network, torch.randn(4, 8))
    monkeypatch.setattr(requantize, "_LIMITED", {})
    with pytest.raises(UnsupportedByTarget, match=f"ends the process that prepares this {kind}"):
        export(quantized, TFLiteExporter(backend="litert"), tmp_path / "net")
    # And it does end it.
    written = []
    monkeypatch.setattr(exporter_module, "operators_that_abort", lambda file: ())
    monkeypatch.setattr(exporter_module, "check_runs", written.append)
    export(quantized, TFLiteExporter(backend="litert"), tmp_path / "net")
    assert _ends(written[0], tmp_path)


def test_a_sum_with_a_constant_says_why_it_is_float(tmp_path: Path) -> None:
    quantized = _converted(LargeConstantCancelled, torch.randn(4, 8) / 10 - 1e6)
    artifact = export(quantized, TFLiteExporter(backend="litert"), tmp_path / "net")
    file = read(artifact.files["model"].read_bytes())
    assert "ADD" in [operator.kind for operator in file.float_operators]
    (note,) = [note for note in artifact.notes if "kernel would end the process" in note]
    assert "the scale of its output is" in note
    assert not any("what they read or write is not" in note for note in artifact.notes)


def test_the_limits_by_hand() -> None:
    # Twice the larger scale over 2**20 times that of the output must stay below 1.
    assert broken_limit("ADD", [0.25, 1.0], 2.0**-18, 8) is None
    assert broken_limit("ADD", [0.25, 1.0], 2.0**-19, 8) is not None
    assert broken_limit("ADD", [1.0, 0.25], 2.0**-13, 16) is None
    assert broken_limit("ADD", [1.0, 0.25], 2.0**-14, 16) is not None
    assert broken_limit("SUB", [1.0, 0.25], 2.0**-30, 8) is None
    # 2**26 times the scale must stay above 1; 16 bits are read from a table.
    assert broken_limit("SOFTMAX", [2.0**-25], 1 / 256, 8) is None
    assert broken_limit("SOFTMAX", [2.0**-26], 1 / 256, 8) is not None
    assert broken_limit("SOFTMAX", [2.0**-26], 1 / 32768, 16) is None
    assert broken_limit("MUL", [1.0, 1.0], 1e-30, 8) is None


@pytest.mark.parametrize(
    "failure",
    [
        "reshape.cc num_input != num_output (3 != 2)Node number 1 (RESHAPE) failed to prepare.",
        "Didn't find op for builtin opcode 'RESHAPE' version '1'. Registration failed.",
    ],
    ids=["by number", "by kind"],
)
def test_what_litert_cannot_prepare_is_named_by_the_layer_before(failure: str) -> None:
    none = np.zeros(0)
    names = ("x", "encoder.head", "lightning_qat_exporters._litert_lowering.Lowered;2")
    file = TFLiteFile(
        tuple(FileTensor(name, "INT8", (1, 4), none, none, 0, None) for name in names),
        (
            FileOperator("FULLY_CONNECTED", (0,), (1,)),
            FileOperator("RESHAPE", (1,), (2,)),
        ),
        {"x": 0},
        {"y": 2},
        {},
    )
    assert places_of_failure(file, failure) == ("RESHAPE behind 'encoder.head'",)
    assert places_of_failure(file, "out of memory") == ()
