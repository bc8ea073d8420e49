"""What commands print: tables for people, and lines that say what a long command is doing."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def say(text: str) -> None:
    """Say what is being done, to whoever watches: on the standard error, if it is a terminal."""
    if sys.stderr.isatty():
        print(f"lightning-qat: {text}", file=sys.stderr)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: drawn by rich on a terminal, columns of plain text for files and pipes.

    rich heeds ``NO_COLOR`` and the terminal's width.

    Args:
        columns: Headings.
        rows: Their cells; a number is aligned to the right.
    """
    numeric = [
        bool(rows) and all(isinstance(r[i], int | float) for r in rows) for i in _up_to(columns)
    ]
    cells = [[_text(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(columns, cells, numeric)
        return
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in _up_to(columns)]
    for row in [columns, *cells]:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        print("  ".join(padded).rstrip())


def _print_rich(
    columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool]
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in cells:
        # As text: a name may hold what rich takes for markup.
        table.add_row(*map(Text, row))
    Console().print(table)


def _up_to(columns: Sequence[str]) -> range:
    return range(len(columns))


def _text(cell: object) -> str:
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)
