"""What runs in the process of its own: ``python -m lightning_qat.export.delivery.child FOLDER``."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from lightning_qat.export.delivery.guard import Interrupts
from lightning_qat.export.delivery.one_target import export_one
from lightning_qat.export.delivery.own_process import ORDER, RESULT
from lightning_qat.export.delivery.result import ExportResult, error_text
from lightning_qat.ir.quantized_model import QuantizedModel


def main(folder: Path) -> None:
    """Read the order, export, and write the result for the process that waits."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    model_file, pickled, order = pickle.loads((folder / ORDER).read_bytes())
    exporter = pickle.loads(pickled)
    # Written by the parent: no file from elsewhere.
    model = QuantizedModel.load(model_file, trust=True)
    result = export_one(model, exporter, order, Interrupts())
    unfinished = folder / f"{RESULT}.tmp"
    unfinished.write_bytes(pickle.dumps(_sendable(result)))
    os.replace(unfinished, folder / RESULT)


def _sendable(result: ExportResult) -> ExportResult:
    """With errors of classes that do not survive pickling as their text."""
    try:
        pickle.loads(pickle.dumps(result))
    except Exception:
        if result.error is None:
            raise
        return replace(result, error=RuntimeError(error_text(result.error)))
    return result


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    if hasattr(os, "killpg"):
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
