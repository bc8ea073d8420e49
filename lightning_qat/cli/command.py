"""What every command has in common: its help as it is written, ``--json``, exit codes."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

FINE, FOUND, WRONG = 0, 1, 2
"""Exit codes: all is well; a check found errors or differences; the command or its input is
wrong."""

EXIT_CODES = (
    "Exit codes: 0 all is well, 1 a check found errors or differences, 2 the command or its input "
    "is wrong."
)

FILE = click.Path(path_type=Path)
"""A path; what is wrong with it the reader of the file says, in its own words."""

_STDOUT = f"{__name__}.stdout"
"""Where a command finds the standard output that ``--json`` keeps for it alone."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Context(click.Context):
    """Ends the program after ``--help``, also where ``main`` was called as a function."""

    def exit(self, code: int = 0) -> NoReturn:
        """Raise ``SystemExit``."""
        self.close()
        raise SystemExit(code)


class WithHelp(click.Command):
    """Help is a docstring, line by line."""

    context_class = Context

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> click.Context:
        """With room for the lines of the help on a wide terminal."""
        return super().make_context(info_name, args, parent, max_content_width=100, **extra)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line, in lower case as Python's own programs write it."""
        pieces = " ".join(self.collect_usage_pieces(ctx))
        formatter.write_usage(ctx.command_path, pieces, prefix="usage: ")

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The docstring, without filling its lines anew: they hold commands to copy."""
        formatter.write(f"\n{inspect.cleandoc(self.help or '')}\n")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The exit codes."""
        formatter.write_paragraph()
        formatter.write_text(EXIT_CODES)


class Command(WithHelp):
    """A command that says in one message what is wrong with its input."""

    def invoke(self, ctx: click.Context) -> int:
        """Run it; the exit code. With ``--json`` libraries print to the standard error."""
        ctx.meta[_STDOUT] = sys.stdout
        apart = redirect_stdout(sys.stderr) if ctx.params.get("as_json") else nullcontext()
        try:
            with apart:
                code: int = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # As of ``| head``: the reader has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FINE
        except (ValueError, OSError, ImportError, MemoryError) as error:
            print(f"{ctx.command_path}: {error}", file=sys.stderr)
            return WRONG
        return code


def command(name: str) -> Callable[[Callable[..., int]], click.Command]:
    """Make a command of a function whose docstring is its help and which returns an exit code."""
    return click.command(name, cls=Command)


def print_json(values: object) -> None:
    """Print what a command has found, as JSON; what JSON has not, as text."""
    text = json.dumps(values, indent=2, default=str)
    print(text, file=click.get_current_context().meta[_STDOUT])


def inputs_option(function: _Function) -> _Function:
    """Add ``--inputs``, a file of arrays for the converted model."""
    return click.option(
        "--inputs",
        type=FILE,
        metavar="FILE.npz",
        help="An array per input of the model, by its name.  [default: the model's example inputs]",
    )(function)


def json_option(function: _Function) -> _Function:
    """Add ``--json``, which sets ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(
        function
    )


def project_options(function: _Function) -> _Function:
    """Add ``--config``, ``--module``, ``--datamodule`` and ``--init-args``: the user's code."""
    options = (
        click.option(
            "--config",
            type=FILE,
            metavar="FILE.yaml",
            help="LightningCLI's configuration: the module and the data, with their arguments.",
        ),
        click.option(
            "--module", metavar="PKG.CLASS", help="The LightningModule, if no class is there."
        ),
        click.option(
            "--datamodule", metavar="PKG.CLASS", help="The LightningDataModule, likewise."
        ),
        click.option(
            "--init-args",
            metavar="JSON",
            help="Arguments of the module's constructor: JSON, YAML, a file.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def trust_option(function: _Function) -> _Function:
    """Add ``--trust``, which loads a file without a look at it."""
    return click.option(
        "--trust",
        is_flag=True,
        help="Load a checkpoint or .pt2 with objects or operators of your own. It may run any "
        "code: for files that you, or people you trust, have made.",
    )(function)
