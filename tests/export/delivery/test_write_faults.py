"""Every single write of an export fails in turn: the rest is written, and the manifest is true."""

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_qat.export.delivery.export_all import export_all
from lightning_qat.export.delivery.result import Delivery
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.export.delivery.odd import Text
from tests.export.delivery.test_odd_exporters import targets


class Writes:
    """Counts the calls that write below a folder, and lets one of them fail."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.failing, self.count = folder, -1, 0
        self.at = ""
        for module, name in ((os, "replace"), (os, "fsync"), (tempfile, "mkdtemp")):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))
        monkeypatch.setattr(Path, "open", self._counted(Path.open, writes=True))

    def _counted(self, function: Callable[..., Any], writes: bool = False) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            mode = str(args[1] if len(args) > 1 else options.get("mode", "r"))
            if writes and "w" not in mode:
                return function(*args, **options)
            self.count += 1
            if self.count == self.failing:
                self.at = function.__name__
                path = args[0] if isinstance(args[0] if args else 0, str | Path) else None
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return function(*args, **options)

        return counted

    def export(self, model: QuantizedModel, failing: int) -> Delivery:
        """Export with the n-th write failing."""
        self.failing, self.count = failing, 0
        return export_all(model, [FakeQuantOnnxExporter(), Text()], self.folder, "net", check=False)


def test_whichever_write_fails_costs_only_its_own_file(
    model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    writes = Writes(out, monkeypatch)
    for _ in range(2):  # There is a manifest to take out of from the second time on.
        assert writes.export(model, -1).problem() is None
    most = writes.count
    # A folder, a file, its way to the disk and its name, for each of three files, and one more.
    assert most >= 12
    seen = set()
    for failing in range(1, most + 1):
        if not ((out / "manifest.json").exists() and targets(out)):
            writes.export(model, -1)
        # The files of the export before are there: the manifest must not speak of them.
        delivery = writes.export(model, failing)
        failed = {*delivery.failed, *delivery.unwritten}
        seen |= failed
        problem = delivery.problem() or ""
        if "manifest.json" not in failed:
            assert targets(out).keys() == {"fake_quant_onnx", "text"}
        elif (out / "manifest.json").exists():
            assert targets(out) == {}
        if not failed:
            # Taking the old entries out failed: the manifest was removed, and written anew.
            assert failing <= 4
            continue
        assert len(failed) == 1
        (name,) = failed
        assert f"{name}: OSError: [Errno 28] No space left on device" in problem
        assert str(out) in problem
        assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert seen == {"net.pt2", "fake_quant_onnx", "text", "manifest.json"}


def test_a_process_that_ends_before_the_manifest_leaves_no_untrue_one(
    model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = Writes(tmp_path, monkeypatch)
    writes.export(model, -1)

    def killed(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    module = sys.modules["lightning_qat.export.delivery.export_all"]
    monkeypatch.setattr(module, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        writes.export(model, -1)
    assert targets(tmp_path) == {}
