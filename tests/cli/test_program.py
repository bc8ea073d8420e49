"""The program itself: its help, its list of commands, its exit codes, what it says is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from lightning_qat.cli.command import EXIT_CODES
from lightning_qat.cli.console import print_table
from lightning_qat.cli.program import COMMANDS, Program
from tests.cli.conftest import Command

FOLDER = Path(__file__).parents[2] / "lightning_qat/cli/commands"


def test_every_command_has_a_file_of_its_name() -> None:
    assert all((FOLDER / f"{name}.py").is_file() for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(command: Command, name: str) -> None:
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"\n  lightning-qat {name}" in out
    assert " ".join(EXIT_CODES.split()) in " ".join(out.split())
    assert "--json" in out


def test_the_programs_help_lists_all_and_says_how_to_complete(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    assert all(f"  {name} " in out and text in out for name, text in COMMANDS.items())
    assert "_LIGHTNING_QAT_COMPLETE=bash_source" in out


def test_without_a_command_the_help_is_on_the_standard_error(command: Command) -> None:
    code, out, err = command()
    assert (code, out) == (2, "")
    assert err.startswith("usage: lightning-qat [OPTIONS] COMMAND")


def test_a_wrong_command_and_a_wrong_option_are_named(command: Command) -> None:
    code, _, err = command("trian")
    assert code == 2
    assert "lightning-qat: error: No such command: 'trian' (choose from " in err
    code, _, err = command("lint", "--prodct", "x")
    assert code == 2
    assert "usage: lightning-qat lint [OPTIONS] MODEL" in err
    assert "lightning-qat lint: error: No such option" in err


def test_the_version_is_that_of_the_package(command: Command) -> None:
    assert command("--version").out == "0.1.0\n"


def test_the_shell_completes_commands_and_options() -> None:
    def completed(words: str, position: int) -> str:
        environment = {
            **os.environ,
            "_LIGHTNING_QAT_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(position),
        }
        code = "from lightning_qat.cli import main; main()"
        arguments = [sys.executable, "-c", code]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
        return done.stdout

    assert completed("lightning-qat re", 1) == "plain,report\nplain,recipe\n"
    assert completed("lightning-qat lint --f", 2) == "plain,--for\n"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = (
        "import os, sys\nfrom lightning_qat.cli import main\n"
        "reader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, 1)\n"
        "sys.exit(main(['recipe', 'int8']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_table_is_plain_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "count"), [("conv", 10), ("[red]x", 2)])
    assert capsys.readouterr().out == "name    count\nconv       10\n[red]x      2\n"


def test_a_terminal_gets_a_drawn_table_and_names_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(("name", "count"), [("conv", 10), ("[red]x", 2)])
    out = capsys.readouterr().out
    assert "─" in out
    assert "[red]x" in out
    assert "\x1b[3" not in out


def test_commands_are_clicks() -> None:
    program = Program("lightning-qat")
    context = click.Context(program)
    found = [program.get_command(context, name) for name in COMMANDS]
    assert all(isinstance(one, click.Command) for one in found)
    assert program.get_command(context, "no such") is None
