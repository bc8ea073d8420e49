"""What importing the package loads, and what the command line's help does: counted, not timed."""

import ast
import functools
from pathlib import Path

import pytest
import torch

import lightning_qat
from lightning_qat import cli
from lightning_qat.model.torch_compile import constant_while_tracing, missing_parts
from tests.interpreters import answers, printed

# One worker imports torch anew, once for all.
pytestmark = pytest.mark.xdist_group("importing")

HEAVY = ("lightning", "onnx", "onnxruntime", "sympy", "torch._dynamo", "torch._inductor")
"""Each takes as long to import as a good part of torch."""


def telling(statement: str, *names: str) -> str:
    """A statement, and which of some modules are loaded after it."""
    return f"{statement}\nimport sys\nprint('LOADED', *set({names}) & set(sys.modules))"


def loaded(text: str) -> set[str]:
    return set(text.split("LOADED")[1].split())


def loaded_by(statement: str, *names: str) -> set[str]:
    """Which of some modules a fresh interpreter has loaded after a statement."""
    return loaded(printed(telling(statement, *names)))


NAMES = ", ".join(name for name in lightning_qat.__all__ if name != "QATCallback")
FUNCTIONS = ("convert", "export", "prepare")
AFTER_TORCH = {
    "all names": telling(
        f"from lightning_qat import {NAMES}\nfrom lightning_qat.layers import Conv2dQAT", *HEAVY
    ),
    "an attribute": telling(
        "import lightning_qat\nlightning_qat.layers.Conv2dQAT", "lightning_qat.layers"
    ),
    **{
        name: telling(
            f"import lightning_qat.{name}\n"
            f"from lightning_qat.{name}.{name} import {name} as function\n"
            f"import lightning_qat\nassert lightning_qat.{name} is function",
            "lightning_qat",
        )
        for name in FUNCTIONS
    },
}
"""Statements that import torch, each for a process in which nothing of ours is loaded."""


@functools.cache
def after_torch() -> dict[str, set[str]]:
    """Which modules each of the statements loads."""
    found = answers("import torch", [*AFTER_TORCH.values()])
    return dict(zip(AFTER_TORCH, map(loaded, found), strict=True))


def test_importing_the_package_loads_not_even_torch() -> None:
    assert loaded_by("import lightning_qat", "torch", "numpy", *HEAVY) == set()


def test_all_names_but_the_callback_load_none_of_the_heavy_modules() -> None:
    assert after_torch()["all names"] == set()


def test_the_callback_loads_nothing_heavy_but_lightning() -> None:
    statements = ("import lightning.pytorch", "from lightning_qat import QATCallback")
    told = printed("\n".join(telling(statement, *HEAVY) for statement in statements))
    before, after = map(loaded, told.splitlines())
    assert "lightning" in before
    assert after == before


COMMANDS = [(), *((name,) for name in cli.program.COMMANDS)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_loads_no_torch(command: tuple[str, ...]) -> None:
    statement = (
        f"from lightning_qat.cli import main\ntry:\n    main({[*command, '--help']})\n"
        "except SystemExit as end:\n    assert not end.code"
    )
    assert loaded_by(statement, "torch", "numpy", "rich", "yaml", *HEAVY) == set()


def test_every_command_is_asked_for_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["no such command"])
    listed = capsys.readouterr().err.partition("choose from ")[2].rstrip(")\n").replace("'", "")
    assert {(name,) for name in listed.split(", ")} == {*COMMANDS} - {()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_stands_before_the_package_of_its_name(name: str) -> None:
    # The assertion is the statement's.
    assert after_torch()[name] == {"lightning_qat"}


def test_packages_and_unknown_names_are_found_as_in_any_package() -> None:
    assert after_torch()["an attribute"] == {"lightning_qat.layers"}
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
