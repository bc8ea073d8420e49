"""What importing the package loads, and what the command line's help does: counted, not timed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_qat
from lightning_qat import cli
from lightning_qat.model.torch_compile import constant_while_tracing, missing_parts

HEAVY = ("lightning", "onnx", "onnxruntime", "sympy", "torch._dynamo", "torch._inductor")
"""Each takes as long to import as a good part of torch."""


def loaded_by(statement: str, *names: str) -> set[str]:
    """Which of some modules a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint('LOADED', *set({names}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split("LOADED")[1].split())


def test_importing_the_package_loads_not_even_torch() -> None:
    assert loaded_by("import lightning_qat", "torch", "numpy", *HEAVY) == set()


def test_all_names_but_the_callback_load_torch_and_none_of_the_heavy_modules() -> None:
    names = ", ".join(name for name in lightning_qat.__all__ if name != "QATCallback")
    statement = f"from lightning_qat import {names}\nfrom lightning_qat.layers import Conv2dQAT"
    assert loaded_by(statement, "torch", *HEAVY) == {"torch"}


def test_the_callback_loads_nothing_heavy_but_lightning() -> None:
    own = loaded_by("import lightning.pytorch", *HEAVY)
    assert loaded_by("from lightning_qat import QATCallback", *HEAVY) == own


COMMANDS = [(), *((name,) for name in ("convert", "lint"))]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_loads_no_torch(command: tuple[str, ...]) -> None:
    statement = (
        f"from lightning_qat.cli import main\ntry:\n    main({[*command, '--help']})\n"
        "except SystemExit as end:\n    assert not end.code"
    )
    assert loaded_by(statement, "torch", "numpy", *HEAVY) == set()


def test_every_command_is_asked_for_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["no such command"])
    listed = capsys.readouterr().err.partition("choose from ")[2].rstrip(")\n").replace("'", "")
    assert {(name,) for name in listed.split(", ")} == {*COMMANDS} - {()}


@pytest.mark.parametrize("name", ["convert", "export", "prepare"])
def test_a_function_stands_before_the_package_of_its_name(name: str) -> None:
    statement = (
        f"import lightning_qat.{name}\nfrom lightning_qat.{name}.{name} import {name} as function\n"
        f"import lightning_qat\nassert lightning_qat.{name} is function"
    )
    assert loaded_by(statement, "torch") == {"torch"}


def test_packages_and_unknown_names_are_found_as_in_any_package() -> None:
    statement = "import lightning_qat\nlightning_qat.layers.Conv2dQAT"
    assert loaded_by(statement, "lightning_qat.layers") == {"lightning_qat.layers"}
    assert {*lightning_qat.__all__, "__doc__"} <= set(dir(lightning_qat))
    with pytest.raises(AttributeError, match="module 'lightning_qat' has no attribute 'nothing'"):
        _ = lightning_qat.nothing


def test_type_checkers_see_the_names_where_the_package_finds_them() -> None:
    tree = ast.parse(Path(lightning_qat.__file__).read_text("utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If)]
    seen = {
        alias.name: (node.module or "").removeprefix("lightning_qat.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == lightning_qat._DEFINED_IN
    assert sorted(seen) == sorted(lightning_qat.__all__)


def test_constants_while_tracing_are_marked_as_torch_marks_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one() -> None: ...

    def other() -> None: ...

    torch.compiler.assume_constant_result(other)
    assert vars(constant_while_tracing(one)) == vars(other)
    monkeypatch.setattr(torch.compiler, "assume_constant_result", lambda function: function)
    assert missing_parts() == ["_dynamo_marked_constant"]
