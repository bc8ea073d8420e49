"""A checkpoint that does not load is called damaged or whole, with what to do; and that works."""

import enum
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_qat import convert
from lightning_qat.checkpoint.load import load_qat_checkpoint, read_checkpoint
from lightning_qat.torch_files.load import UntrustedObjects, load_saved, load_without_objects
from tests.models import trained
from tests.tiny_module import TinyModule


@dataclass
class Shape:
    """A hyperparameter of the user's."""

    width: int = 6


class Size(enum.Enum):
    """Another."""

    LARGE = "large"


def content(**more: Any) -> dict[str, Any]:
    module: Any = trained(TinyModule(width=6), torch.randn(4, 1, 8, 8))
    return {
        "state_dict": module.state_dict(),
        "hyper_parameters": {"width": 6, "lr": 0.1},
        "pytorch-lightning_version": pl.__version__,
        **more,
    }


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return content()


def write(path: Path, values: Any) -> Path:
    torch.save(values, path)
    return path


OBJECTS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "dataclass": (Shape(), (Shape,)),
    "enum": (Size.LARGE, (Size,)),
    "path": (Path("data"), (PosixPath,)),
    "frozenset": (frozenset((1, 2)), (frozenset,)),
    "NumPy scalar": (
        np.float32(1),
        (np.float32(1).__reduce__()[0], np.dtype, type(np.dtype(np.float32))),
    ),
    "NumPy array": (
        np.ones(3),
        (np.ones(3).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.float64))),
    ),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_healthy_checkpoint_with_an_object_is_called_whole_and_loads_as_it_says(
    kind: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    value, classes = OBJECTS[kind]
    path = write(tmp_path / "a.ckpt", {**whole, "hyper_parameters": {"width": 6, "note": value}})
    with pytest.raises(UntrustedObjects, match=r"is whole, but it holds .*pass weights_only=False"):
        load_qat_checkpoint(TinyModule, path)
    assert load_qat_checkpoint(TinyModule, path, weights_only=False).hparams["width"] == 6
    with torch.serialization.safe_globals([*classes]):
        assert load_qat_checkpoint(TinyModule, path).hparams["width"] == 6
    # Its weights need no trust.
    weights = load_without_objects(path)["state_dict"]
    assert torch.equal(weights["head.weight"], whole["state_dict"]["head.weight"])


def test_the_remedy_of_an_object_is_a_line_of_python(whole: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", {**whole, "hyper_parameters": {"shape": Shape()}})
    with pytest.raises(UntrustedObjects) as refused:
        load_saved(path)
    line = str(refused.value).partition("name them first: ")[2].removesuffix(".")
    assert line.startswith(f"from {__name__} import Shape; torch.serialization.add_safe")
    script = f"import torch; {line}; torch.load({str(path)!r}, weights_only=True)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_a_class_that_is_gone_is_named(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.ckpt", {**whole, "hyper_parameters": {"shape": Shape()}})
    monkeypatch.delattr(sys.modules[__name__], "Shape")
    with pytest.raises(
        ValueError, match=r"Can't get attribute 'Shape'.*Import or define the class"
    ):
        load_qat_checkpoint(TinyModule, path, weights_only=False)


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty. It was cut off"),
    "page": (b"\n<!DOCTYPE html><html>", "it is a web page. Download the file itself"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "text": (b"weights", "something else than what torch.save writes"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_checkpoint_is_named(kind: str, tmp_path: Path) -> None:
    start, text = FILES[kind]
    (tmp_path / "a.ckpt").write_bytes(start)
    with pytest.raises(ValueError, match=rf"a\.ckpt' must be a whole checkpoint; .*{text}"):
        load_qat_checkpoint(TinyModule, tmp_path / "a.ckpt")


def test_torchs_old_format_is_named_and_written_anew(whole: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    torch.save(whole, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"format before 1\.6.*torch\.save\(torch\.load"):
        load_qat_checkpoint(TinyModule, path)
    torch.save(torch.load(path, weights_only=False), path)
    load_qat_checkpoint(TinyModule, path)


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        (".metadata", "sharded strategies write checkpoints.*consolidate_checkpoint FOLDER"),
        ("zero_to_fp32.py", "DeepSpeed.*convert_zero_checkpoint_to_fp32_state_dict"),
        ("last.ckpt", "is a folder; name a file. It holds last.ckpt"),
    ],
)
def test_a_folder_is_named_by_what_wrote_it(tmp_path: Path, inside: str, text: str) -> None:
    (tmp_path / inside).touch()
    with pytest.raises(ValueError, match=text):
        load_qat_checkpoint(TinyModule, tmp_path)


def test_no_file_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be a checkpoint at .*no\.ckpt'; no file"):
        load_qat_checkpoint(TinyModule, tmp_path / "no.ckpt")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9, 0.999])
def test_a_checkpoint_that_was_cut_off_is_named(
    whole: dict[str, Any], tmp_path: Path, share: float
) -> None:
    path = write(tmp_path / "a.ckpt", whole)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="cut off or damaged; use an earlier one"):
        load_qat_checkpoint(TinyModule, path)


Change = Callable[[dict[str, Any]], Any]
CHANGED: dict[str, tuple[Change, str]] = {
    "a list": (lambda c: [c], "holds a list, no table with a state_dict"),
    "no weights": (lambda c: {"epoch": 1}, "'state_dict' must be a table of tensors; got NoneType"),
    "weights alone": (lambda c: c["state_dict"], "it is a state_dict alone. Load it with prepare"),
    "a list of weights": (lambda c: {**c, "state_dict": []}, "'state_dict' must be a table"),
    "hyperparameters": (lambda c: {**c, "hyper_parameters": 3}, "'hyper_parameters' must be"),
    "callbacks": (lambda c: {**c, "callbacks": [1]}, "'callbacks' must be a table; got list"),
    "state": (
        lambda c: {**c, "callbacks": {"QATCallback": {"version": "1", "phase": {}, "recipe": 3}}},
        "'version' must be a count; got '1'; .*'batches_seen' must be a count; got None; .*'phase' "
        "must be a phase of the schedule; got {}; .*'recipe' must be a table; got int",
    ),
    "a recipe": (
        lambda c: {**c, "callbacks": {"QATCallback": {"batches_seen": 0, "recipe": {"wait": 1}}}},
        "'recipe' must be a recipe; .*wait",
    ),
    "version": (lambda c: {**c, "pytorch-lightning_version": 2}, "must be a text; got 2"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_part_that_is_missing_or_of_another_kind_is_named(
    what: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    change, text = CHANGED[what]
    path = write(tmp_path / "a.ckpt", change(whole))
    for read in (lambda: load_qat_checkpoint(TinyModule, path), lambda: read_checkpoint(path)):
        with pytest.raises(ValueError, match=text):
            read()


def test_a_plan_that_was_edited_is_refused(whole: dict[str, Any], tmp_path: Path) -> None:
    # As an earlier version stored it, without a checksum.
    weights = {**whole["state_dict"], "_qat_plan": {"tensors": [{}]}}
    path = write(tmp_path / "a.ckpt", {**whole, "state_dict": weights})
    with pytest.raises(ValueError, match=r"specs of its quantizers and the plan .*KeyError"):
        load_qat_checkpoint(TinyModule, path)


def test_a_weight_of_another_shape_is_torchs_error(whole: dict[str, Any], tmp_path: Path) -> None:
    weights = {**whole["state_dict"], "head.weight": torch.zeros(1, 1)}
    path = write(tmp_path / "a.ckpt", {**whole, "state_dict": weights})
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        load_qat_checkpoint(TinyModule, path)


class Needs(TinyModule):
    """A constructor that the checkpoint does not know all of."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__(width * depth)


def test_a_missing_hyperparameter_is_named_with_the_keyword(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.ckpt", whole)
    with pytest.raises(
        ValueError, match=r"TypeError: .*missing.*'depth'.*load_qat_checkpoint\(Nee"
    ):
        load_qat_checkpoint(Needs, path)
    loaded = load_qat_checkpoint(Needs, path, depth=1)
    assert convert(loaded.eval(), torch.randn(2, 1, 8, 8)).tensors


def test_lightning_before_2_6_loads_no_more_than_is_allowed(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = TinyModule.load_from_checkpoint

    def before(path: Path, map_location: Any = None, **kwargs: Any) -> Any:
        # It has no weights_only: everything is a hyperparameter, and every file is trusted.
        assert "weights_only" not in kwargs
        return newest(path, map_location=map_location, weights_only=False, **kwargs)

    monkeypatch.setattr(TinyModule, "load_from_checkpoint", before)
    path = write(tmp_path / "a.ckpt", {**whole, "hyper_parameters": {"width": 6, "s": Shape()}})
    with pytest.raises(UntrustedObjects):
        load_qat_checkpoint(TinyModule, path)
    assert load_qat_checkpoint(TinyModule, path, weights_only=False).hparams["width"] == 6
