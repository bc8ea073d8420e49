"""What must hold of a folder at any moment, and what at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

from lightning_qat import load_qat_checkpoint
from lightning_qat.amct.record import read_record
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.work_folder import PREFIX
from reliability.kills.victim import OUT, SAVED, TARGETS, Victim


def problems(folder: Path) -> list[str]:
    """What is half written or untrue; leftovers are allowed until the next run."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if _is_final(p, folder)):
        try:
            CHECKS[path.suffix](path)
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}")
    return found


def leftovers(folder: Path) -> list[str]:
    """Unfinished files of killed processes."""
    return [str(p.relative_to(folder)) for p in folder.rglob(f"{PREFIX}*")]


def result(folder: Path) -> dict[str, Any]:
    """What the run is, to the bit."""
    end = torch.load(folder / SAVED / "end.ckpt", weights_only=True)
    said = json.loads((folder / OUT / "manifest.json").read_text("utf-8"))["targets"]
    names = ("victim_qdq.onnx", "victim_deploy_model.onnx", "victim_fake_quant_model.onnx")
    return {
        "errors": [said[target].get("error") for target in TARGETS],
        "weights and ranges": _digest(end["state_dict"]),
        "optimizer": _digest(end["optimizer_states"]),
        "converted model": QuantizedModel.load(folder / OUT / "victim.pt2").fingerprint,
        **{name: hashlib.sha256((folder / OUT / name).read_bytes()).hexdigest() for name in names},
    }


def _is_final(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    # Lightning writes its checkpoints in the folder for temporary files first.
    return path.is_file() and not hidden and path.relative_to(folder).parts[0] in (OUT, SAVED)


def _checkpoint(path: Path) -> None:
    assert torch.load(path, weights_only=True)["state_dict"]
    load_qat_checkpoint(Victim, path)


def _model(path: Path) -> None:
    QuantizedModel.load(path)


def _onnx(path: Path) -> None:
    # The domain of CANN's operators is not the checker's.
    model = onnx.load(path)
    assert model.graph.node
    assert model.graph.output


def _json(path: Path) -> None:
    said = json.loads(path.read_text("utf-8"))
    for target, entry in said["targets"].items():
        # An export that Ctrl-C has ended says so.
        assert entry.get("files") or entry.get("error"), f"{target} has neither files nor error"
        for file in entry.get("files", {}).values():
            content = (path.parent / file["path"]).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            assert digest == file["sha256"], f"{file['path']} is another one"


def _record(path: Path) -> None:
    assert read_record(path)


def _html(path: Path) -> None:
    assert path.read_text("utf-8").rstrip().endswith("</html>")


CHECKS: dict[str, Callable[[Path], None]] = {
    ".ckpt": _checkpoint,
    ".pt2": _model,
    ".onnx": _onnx,
    ".json": _json,
    ".txt": _record,
    ".html": _html,
}
"""How every kind of file is looked at; a file of another kind is a problem (KeyError)."""


def _digest(values: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(repr((value.dtype, tuple(value.shape))).encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(values)
    return digest.hexdigest()
