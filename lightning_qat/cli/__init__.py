"""The command line: one file per command; a command imports what it needs when it runs."""

from lightning_qat.cli.program import main

__all__ = ["main"]
