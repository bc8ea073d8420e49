"""A trial of exporters: all errors, no warnings, no files, within its time."""

import warnings
from pathlib import Path

import pytest
import torch

from lightning_qat.convert.convert import convert
from lightning_qat.export.protocol import Artifact, Unsupported, UnsupportedByTarget
from lightning_qat.export.trial import try_exporters
from lightning_qat.ir.quantized_model import QuantizedModel
from tests.models import inputs_for, linear, trained


class Target:
    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error = name, error
        self.folders: list[Path] = []

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        warnings.warn("numbers that mean nothing", stacklevel=2)
        self.folders.append(path_prefix.parent)
        if self.error is not None:
            raise self.error
        path_prefix.touch()
        return Artifact(self.name, {"model": path_prefix})


@pytest.fixture(scope="module")
def converted() -> QuantizedModel:
    torch.manual_seed(0)
    return convert(trained(linear(), inputs_for("linear")), inputs_for("linear"))


def test_what_the_model_is_to_blame_for_is_collected(converted: QuantizedModel) -> None:
    lacks = UnsupportedByTarget("a", [Unsupported("fc", "it has no form")])
    targets = [
        Target("a", lacks),
        Target("b", KeyError("odd")),
        Target("c"),
        Target("d", OSError()),
    ]
    trial = try_exporters(converted, targets)
    assert trial.errors == {"a": lacks, "b": targets[1].error}
    # A full disk may be emptied before training ends.
    assert trial.passed == ("c", "d")
    assert not any(folder.exists() for target in targets for folder in target.folders)


def test_what_would_take_too_long_is_not_begun(
    converted: QuantizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 10.0, 45.0, 55.0, 55.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    # The capture took 10 s: the second target begins at 45 s of 60, the third would at 55 s.
    targets = [Target("a"), Target("b"), Target("c")]
    trial = try_exporters(converted, targets, began=0.0)
    assert (trial.passed, trial.untried, trial.seconds) == (("a", "b"), ("c",), 55.0)
    assert targets[2].folders == []
