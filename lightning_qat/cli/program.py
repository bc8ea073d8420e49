"""The program: finds a command's file when the command is asked for, and reports what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

import click

from lightning_qat.cli.command import WRONG, WithHelp

COMMANDS: Mapping[str, str] = {
    "export": "export a QAT checkpoint, or a converted model, to files",
    "calibrate": "quantize a float checkpoint without training, and export it",
    "inspect": "show what a file quantizes and what it leaves float",
    "verify": "compare exported files with the converted model",
    "compare": "say where an exported file departs from the converted model",
    "report": "write one page on an export: what is quantized, and how well",
    "sensitivity": "say what quantizing each layer costs, and find a recipe",
    "convert": "convert a quantized ONNX model of any tool",
    "lint": "check a CANN deploy model, or a QDQ model for TensorRT",
    "run": "run a deploy or QDQ model in ONNX Runtime",
    "recipe": "show, check and translate recipes",
    "doctor": "show what is installed and what works here",
}
"""Every command, in the order of the help: the file of its name in ``commands``, in a line."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_TRAINING = "Quantized models for integer targets. Training is Python: see QATCallback."
_COMPLETION = """
Completion of commands and options by the tab key, in bash (zsh and fish likewise):

  eval "$(_LIGHTNING_QAT_COMPLETE=bash_source lightning-qat)"   # in ~/.bashrc
"""


class Program(WithHelp, click.Group):
    """The commands, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, in the table's order."""
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by name; ``None``: there is none."""
        if cmd_name not in COMMANDS:
            return None
        found = getattr(import_module(f"lightning_qat.cli.commands.{cmd_name}"), cmd_name)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the first argument; the message on another one names all."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            names = ", ".join(map(repr, COMMANDS))
            ctx.fail(f"No such command: {args[0]!r} (choose from {names})")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table; no command is imported."""
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])
        formatter.write(_COMPLETION)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; ``sys.argv`` by default.

    Returns:
        0 if all is well, 1 if a check found errors or differences, 2 if the input cannot be used.

    Raises:
        SystemExit: After help (0), and where the arguments are wrong (2).
    """
    try:
        code = _program.main(arguments, "lightning-qat", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(WRONG) from None
    except click.UsageError as error:
        context = error.ctx
        assert context is not None  # click sets it before the error leaves the command
        print(context.get_usage(), file=sys.stderr)
        print(f"{context.command_path}: error: {error.format_message()}", file=sys.stderr)
        raise SystemExit(WRONG) from None
    except click.Abort:
        print("lightning-qat: interrupted", file=sys.stderr)
        return INTERRUPTED
    assert isinstance(code, int)  # every command returns one
    return code


@click.version_option(package_name="lightning-qat", message="%(version)s")
@click.command("lightning-qat", cls=Program, help=_TRAINING, no_args_is_help=True)
def _program() -> None:
    """Options of the program itself are ``--help`` and ``--version``."""
