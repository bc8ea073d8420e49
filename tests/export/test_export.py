"""The way to an exporter: by name, itself, its class; and what is refused."""

import importlib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import (
    Artifact,
    MissingDependency,
    Unsupported,
    UnsupportedByTarget,
)
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.models import inputs_for, linear, trained

# The function of the same name hides the module in the package.
MODULE = importlib.import_module("lightning_qat.export.load")


class Recording:
    """An exporter that writes nothing into its file, and says what it was asked."""

    name = "recording"

    def __init__(self, available: bool = True) -> None:
        self.available = available
        self.calls: list[Any] = []

    def check_available(self) -> None:
        self.calls.append("check")
        if not self.available:
            raise MissingDependency("recording needs tape")

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        self.calls.append(path_prefix)
        path_prefix.touch()
        return Artifact(self.name, {"model": path_prefix})


@pytest.fixture
def converted() -> QuantizedModel:
    x = inputs_for("linear")
    return convert(trained(linear(), x), x)


def test_an_exporter_is_found_by_its_name() -> None:
    assert isinstance(load_exporter("fake_quant_onnx"), FakeQuantOnnxExporter)


def test_an_exporter_may_be_an_instance_or_a_class() -> None:
    instance = Recording()
    assert load_exporter(instance) is instance
    assert isinstance(load_exporter(Recording), Recording)


def test_an_unknown_name_is_refused_with_the_closest_and_all_installed() -> None:
    with pytest.raises(
        ValueError,
        match=r"No exporter named 'fake_quant_onx'; closest names: 'fake_quant_onnx'.*"
        r"Installed exporters: \[.*'fake_quant_onnx'.*\]\.",
    ):
        load_exporter("fake_quant_onx")


def test_an_exporter_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no_such_package_here:Exporter", "lightning_qat.exporters")
    monkeypatch.setattr(MODULE, "entry_points", lambda group: [broken])
    with pytest.raises(
        MissingDependency,
        match=r"The exporter 'broken' needs a package that is not installed: No module named "
        r"'no_such_package_here'\. Install it, or leave the exporter out",
    ):
        load_exporter("broken")


def test_asking_for_one_exporter_imports_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("broken", "no_such_package_here:Exporter", "lightning_qat.exporters"),
        EntryPoint("good", "tests.export.test_export:Recording", "lightning_qat.exporters"),
    ]
    monkeypatch.setattr(MODULE, "entry_points", lambda group: points)
    assert load_exporter("good").name == "recording"


@pytest.mark.parametrize("thing", [3, nn.Linear(2, 2), dict, None])
def test_what_is_no_exporter_is_refused(thing: Any) -> None:
    kind = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    with pytest.raises(
        TypeError, match=rf"must have name, check_available\(\) and export\(\); got {kind}"
    ):
        load_exporter(thing)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), None])
def test_only_a_converted_model_is_exported(thing: Any) -> None:
    exporter = Recording()
    text = rf"export takes a QuantizedModel; got {type(thing).__name__}\. Call convert\("
    with pytest.raises(TypeError, match=text):
        export(thing, exporter, "net")
    assert exporter.calls == []


@pytest.mark.parametrize("as_path", [True, False])
def test_export_checks_first_and_then_writes(
    converted: QuantizedModel, tmp_path: Path, as_path: bool
) -> None:
    exporter = Recording()
    prefix = tmp_path / "net"
    artifact = export(converted, exporter, prefix if as_path else str(prefix))
    assert exporter.calls == ["check", prefix]
    assert artifact == Artifact("recording", {"model": prefix})


def test_nothing_is_written_when_the_check_fails(converted: QuantizedModel, tmp_path: Path) -> None:
    exporter = Recording(available=False)
    with pytest.raises(MissingDependency, match="recording needs tape"):
        export(converted, exporter, tmp_path / "net")
    assert exporter.calls == ["check"]


def test_everything_that_a_target_cannot_express_is_listed() -> None:
    problems = (
        Unsupported("conv1", "3-D weights are unknown", "Use Conv2d"),
        Unsupported("head", "so are these", "Exclude it"),
    )
    error = UnsupportedByTarget("toaster", problems)
    assert str(error) == (
        "The target 'toaster' cannot express:\n"
        "  conv1: 3-D weights are unknown. Use Conv2d\n"
        "  head: so are these. Exclude it"
    )
    assert (error.target, error.problems) == ("toaster", problems)
