"""TinyNeuralNetwork found or named as missing; the process is left as it was."""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_qat.export.protocol import MissingDependency, UnsupportedByTarget
from lightning_qat_exporters.tflite.tinynn import backend as _tinynn
from tests import join_networks
from tests.exporters.tflite.tinynn_files import converted, file_of, needs_tinynn, written

# Whether TinyNeuralNetwork is there


@pytest.fixture
def without_tinynn() -> Iterator[None]:
    """A process that has not imported anything called tinynn, for the time of a test."""
    loaded = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "tinynn"}
    for name in loaded:
        del sys.modules[name]
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "tinynn"]:
        del sys.modules[name]
    sys.modules.update(loaded)


def package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.usefixtures("without_tinynn")
def test_its_absence_is_told_with_where_to_get_it() -> None:
    # Not with monkeypatch, which would tidy up after the fixture has put things back.
    sys.modules["tinynn"] = None  # type: ignore[assignment] # makes the import fail
    with pytest.raises(MissingDependency, match="is not installed") as caught:
        _tinynn.check_available()
    assert "git+https://github.com/alibaba/TinyNeuralNetwork" in str(caught.value)
    assert 'backend="litert"' in str(caught.value)


@pytest.mark.usefixtures("without_tinynn")
@pytest.mark.parametrize(
    "files",
    [{"tinynn/__init__.py": ""}, {"tinynn/__init__.py": "", "tinynn/converter/__init__.py": ""}],
    ids=["no converter", "another converter"],
)
def test_another_package_of_its_name_is_recognised(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, files)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match="is not TinyNeuralNetwork") as caught:
        _tinynn.check_available()
    assert "pip uninstall tinynn" in str(caught.value)


@pytest.mark.usefixtures("without_tinynn")
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_igraph", "ModuleNotFoundError: No module named 'no_such_igraph'"),
        ("raise RuntimeError('operator nms')", "RuntimeError: operator nms"),
    ],
)
def test_an_import_that_fails_is_told_with_its_reason(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, {"tinynn/__init__.py": "", "tinynn/converter/__init__.py": code})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match="cannot be imported") as caught:
        _tinynn.check_available()
    assert reason in str(caught.value)


CONVERT = """
import logging
import sys
from pathlib import Path
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.tflite.flatbuffer.file import pack
from lightning_qat_exporters.tflite.tinynn import backend
model = QuantizedModel.load(sys.argv[1])
Path(sys.argv[2]).write_bytes(pack(backend.convert(model, io="float", layout="nhwc")))
assert logging.getLogger().handlers == []
"""
"""A process that converts a saved model."""


@needs_tinynn
def test_the_same_model_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    # Sets of strings have another order there.
    converted("mobilenet_v3_block").save(tmp_path / "model.pt2")
    command = [sys.executable, "-c", CONVERT, tmp_path / "model.pt2", tmp_path / "model.tflite"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (tmp_path / "model.tflite").read_bytes() == file_of("mobilenet_v3_block")


# The process


@dataclass
class ProcessState:
    """What a library may leave behind."""

    handlers: list[logging.Handler]
    propagates: bool
    dtype: torch.dtype
    engine: str
    filters: list[Any]
    directory: list[str]


def process_state() -> ProcessState:
    return ProcessState(
        list(logging.getLogger().handlers),
        logging.getLogger("tinynn").propagate,
        torch.get_default_dtype(),
        torch.backends.quantized.engine,
        list(warnings.filters),
        sorted(os.listdir()),
    )


@needs_tinynn
@pytest.mark.parametrize("succeeds", [True, False], ids=["converted", "failed"])
def test_nothing_is_left_in_the_process(
    succeeds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from tinynn.converter.operators.optimize import GraphOptimizer
    from tinynn.converter.operators.torch import OPERATOR_CONVERTER_DICT

    model = converted("dense_block")
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float64)
    table, passes = dict(OPERATOR_CONVERTER_DICT), dict(vars(GraphOptimizer))
    before = process_state()
    if succeeds:
        written(model)
    else:

        def fail(*_: Any) -> None:
            raise RuntimeError("in the middle")

        monkeypatch.setattr("tinynn.converter.base.OPVersioner.process", fail)
        with pytest.raises(UnsupportedByTarget, match="converter failed: RuntimeError: in the mid"):
            written(model)
    assert process_state() == before
    assert OPERATOR_CONVERTER_DICT == table
    assert dict(vars(GraphOptimizer)) == passes
    assert capfd.readouterr() == ("", "")


@needs_tinynn
def test_the_first_conversion_of_a_process_is_silent(tmp_path: Path) -> None:
    converted("dense_block").save(tmp_path / "model.pt2")
    # Only torch's own reading of a saved program warns.
    options = ["-W", "error", "-W", "ignore::FutureWarning"]
    command = [*options, "-c", CONVERT, tmp_path / "model.pt2", tmp_path / "model.tflite"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_tinynn
def test_the_model_is_untouched() -> None:
    model, x = converted("unet"), join_networks.inputs_for("unet")
    before = {**model.program.state_dict, **model.program.constants}
    copies = {name: value.clone() for name, value in before.items()}
    output, code = model(x), model.program.graph_module.code
    written(model, "uint8")
    after = {**model.program.state_dict, **model.program.constants}
    assert all(torch.equal(after[name], value) for name, value in copies.items())
    assert model.program.graph_module.code == code
    assert torch.equal(model(x), output)
