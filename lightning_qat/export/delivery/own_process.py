"""One target in a process of its own: it may hang, crash or end, and costs only itself."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning_qat.export.delivery.one_target import Order
from lightning_qat.export.delivery.result import ExportResult
from lightning_qat.export.protocol import Exporter
from lightning_qat.work_folder import work_folder

ORDER, RESULT = "order", "result"
"""Names of the files that go to the process and come from it."""


def problem_of(exporter: Exporter) -> str | None:
    """Why an exporter cannot be sent to a process of its own; ``None``: it can."""
    if type(exporter).__module__ == "__main__":
        return (
            f"An export timeout runs each exporter in a process of its own, which imports its "
            f"class; {type(exporter).__name__} is defined in the script that runs. Move it into a "
            "file of its own and import it, or leave the timeout out."
        )
    try:
        pickle.loads(pickle.dumps(exporter))
    except Exception as error:
        return (
            f"An export timeout runs each exporter in a process of its own, so it must be possible "
            f"to pickle it; {exporter.name!r} cannot be: {type(error).__name__}: {error}. Define "
            "its class at the top of a file, without lambdas or open files, or leave the timeout "
            "out."
        )
    return None


def export_apart(
    model_file: Path, exporter: Exporter, order: Order, timeout: float
) -> ExportResult:
    """As ``export_one``, in a new process that reads the model from its file.

    It takes the time that ``import torch`` takes, and the memory of the model once more.

    Args:
        model_file: What ``QuantizedModel.save`` wrote.
        exporter: The target's; pickled.
        order: What is asked for.
        timeout: Seconds that the process may take, its start included.
    """
    try:
        with work_folder(Path(tempfile.gettempdir())) as folder:
            task = (model_file.absolute(), pickle.dumps(exporter), order)
            (folder / ORDER).write_bytes(pickle.dumps(task))
            code = _run(folder, timeout)
            if (folder / RESULT).is_file():
                result: ExportResult = pickle.loads((folder / RESULT).read_bytes())
                return result
    except Exception as error:
        return ExportResult(exporter.name, error=error)
    return ExportResult(exporter.name, error=_without_result(code, timeout))


def _run(folder: Path, timeout: float) -> int | None:
    """The exit code; ``None``: it took too long."""
    paths = [path or os.getcwd() for path in sys.path]
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-m", f"{__package__}.child", str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        # The process ends itself when this pipe closes, that is when ours dies.
        stdin=subprocess.PIPE,
        # Ctrl-C is for us; and with a group of its own, what it starts ends with it.
        start_new_session=True,
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    else:
        process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _without_result(code: int | None, timeout: float) -> Exception:
    if code is None:
        return TimeoutError(
            f"the export took longer than its timeout of {timeout:g} s, and was ended. If it needs "
            "more time, give it more."
        )
    by = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return RuntimeError(
        f"the process of the export ended with {by} and without a result; what it printed is above."
    )
