"""A target that hangs, crashes or ends its process costs only itself, where a timeout is given."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_qat.export.delivery.export_all import export_all
from lightning_qat.export.delivery.own_process import problem_of
from lightning_qat.export.protocol import Exporter
from lightning_qat.export.trial import try_exporters
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter, TFLiteExporter
from tests.export.delivery import odd
from tests.export.delivery.odd import Text
from tests.export.delivery.test_odd_exporters import targets

MINUTES = 300.0
"""More than any of these needs on a busy machine."""


def lives(number: int) -> bool:
    """Whether a process runs; one that ended and that nobody has waited for has no command line."""
    try:
        return bool(Path(f"/proc/{number}/cmdline").read_bytes())
    except FileNotFoundError:
        return False


def test_crashes_are_errors_and_our_own_files_are_as_ever(
    model: QuantizedModel, tmp_path: Path
) -> None:
    exporters = [
        Text("crashes", odd.crashes),
        Text("ends", odd.ends_the_process),
        Text("odd", odd.raises_what_cannot_be_sent),
        FakeQuantOnnxExporter(),
    ]
    apart = export_all(model, exporters, tmp_path / "apart", "net", timeout=MINUTES)
    crashed, ended, unsendable, ours = apart.results
    assert "ended with signal SIGSEGV and without a result" in str(crashed.error)
    assert "ended with exit code 0 and without a result" in str(ended.error)
    assert str(unsendable.error) == "Local: made here"
    here = export_all(model, exporters[3:], tmp_path / "here", "net").results[0]
    assert ours.error is None
    assert ours.artifact is not None
    assert here.artifact is not None
    assert ours.agreement == here.agreement
    assert ours.artifact.integers == here.artifact.integers
    name = "net_qdq.onnx"
    assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    said = targets(tmp_path / "apart")
    assert said["fake_quant_onnx"] == targets(tmp_path / "here")["fake_quant_onnx"]
    assert "SIGSEGV" in said["crashes"]["error"]


def test_what_takes_too_long_is_ended(model: QuantizedModel, tmp_path: Path) -> None:
    began = time.monotonic()
    delivery = export_all(model, [Text("hangs", odd.hangs)], tmp_path, "net", timeout=0.2)
    assert time.monotonic() - began < 60
    (result,) = delivery.results
    assert isinstance(result.error, TimeoutError)
    assert "took longer than its timeout of 0.2 s" in targets(tmp_path)["hangs"]["error"]


def test_a_trial_before_training_has_the_timeout_too(model: QuantizedModel) -> None:
    trial = try_exporters(model, [Text("hangs", odd.hangs)], timeout=0.2)
    assert isinstance(trial.errors["hangs"], TimeoutError)


def test_the_process_ends_with_ours(model_file: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lightning_qat.export.delivery.one_target import Order\n"
        "from lightning_qat.export.delivery import own_process\n"
        "from tests.export.delivery.odd import Text, hangs\n"
        "began = own_process.subprocess.Popen\n"
        "def popen(*args, **options):\n"
        "    process = began(*args, **options)\n"
        "    print(process.pid, flush=True)\n"
        "    return process\n"
        "own_process.subprocess.Popen = popen\n"
        f"order = Order(Path({str(tmp_path)!r}) / 'net')\n"
        f"own_process.export_apart(Path({str(model_file)!r}), Text('t', hangs), order, 600)\n"
    )
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 120
    while lives(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not lives(child)


@pytest.mark.parametrize("exporter", [FakeQuantOnnxExporter(), CannExporter(), TFLiteExporter()])
def test_our_exporters_can_be_sent(exporter: Exporter) -> None:
    assert problem_of(exporter) is None


def test_what_cannot_be_sent_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    text = problem_of(Text("lambda", lambda model: None)) or ""
    assert "must be possible to pickle it; 'lambda' cannot be" in text
    monkeypatch.setattr(Text, "__module__", "__main__")
    text = problem_of(Text("in the script")) or ""
    assert "Text is defined in the script that runs. Move it into a file of its own" in text
