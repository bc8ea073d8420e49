"""Fuzz the readers of files: broken files must be read or refused with a documented error.

    python -m reliability.fuzz                          every reader, 60 seconds each
    python -m reliability.fuzz convert lint             two of them
    python -m reliability.fuzz convert --count 100000   so many inputs
    python -m reliability.fuzz convert --show           tracebacks of what was found

The files that a reader neither read nor refused are kept in the folder --keep, one per place. An
input follows from its number and --seed, so a run repeats. A run that is stopped counts what it has
read so far. Ends with 1 if anything was found, with 130 if it was stopped.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from reliability.fuzz.readers import READERS
from reliability.fuzz.run import Outcome, fuzz


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    names = options.reader or sorted(READERS)
    console = Console()
    outcomes: dict[str, Outcome] = {}
    stopped = False
    with _progress(console) as progress:
        try:
            for name in names:
                _fuzz_one(name, options, progress, outcomes)
        except KeyboardInterrupt:
            stopped = True
    console.print(_table([*outcomes.values()]))
    for outcome in outcomes.values():
        for place, found in sorted(outcome.found.items()):
            console.print(
                f"{outcome.reader}: {len(found)} x {place}", markup=False, highlight=False
            )
            if options.show:
                console.print(found[0].detail, markup=False, highlight=False)
    if stopped:
        return 130
    return 1 if any(outcome.found for outcome in outcomes.values()) else 0


def _fuzz_one(
    name: str, options: argparse.Namespace, progress: Progress, outcomes: dict[str, Outcome]
) -> None:
    """Fuzz one reader; what becomes of its inputs is in ``outcomes``, however it ends."""
    task = progress.add_task(name, total=options.count or options.seconds, inputs=0, found=0)

    def show(outcome: Outcome) -> None:
        outcomes[name] = outcome
        _show(progress, task, outcome, options.count)

    with tempfile.TemporaryDirectory() as scratch:
        try:
            fuzz(
                READERS[name],
                Path(scratch) / name,
                count=options.count,
                seconds=None if options.count else options.seconds,
                seed=options.seed,
                jobs=options.jobs,
                progress=show,
            )
        finally:
            if name in outcomes:
                _keep(outcomes[name], options.keep)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reliability.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reader", nargs="*", choices=[*sorted(READERS), []], help="default: all")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--count", type=int, help="number of inputs per reader")
    length.add_argument("--seconds", type=float, default=60, help="time per reader (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds make other inputs")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz_findings"), help="folder for findings"
    )
    parser.add_argument("--show", action="store_true", help="print a traceback per place")
    return parser


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        TextColumn("{task.fields[inputs]:>8,} inputs, {task.fields[found]} found"),
        TimeElapsedColumn(),
        console=console,
    )


def _show(progress: Progress, task: TaskID, outcome: Outcome, count: int | None) -> None:
    found = sum(map(len, outcome.found.values()))
    completed = outcome.inputs if count else outcome.seconds
    progress.update(task, completed=completed, inputs=outcome.inputs, found=found)


def _keep(outcome: Outcome, folder: Path) -> None:
    """Write one input per place, and the traceback beside it."""
    for place, found in outcome.found.items():
        name = "".join(c if c.isalnum() else "_" for c in f"{outcome.reader}_{place}")[:120]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}{found[0].suffix}").write_bytes(found[0].content)
        (folder / f"{name}.traceback").write_text(f"input {found[0].index}\n{found[0].detail}")


def _table(outcomes: list[Outcome]) -> Table:
    table = Table("reader", title="Broken files", title_justify="left")
    for column in ("inputs", "accepted", "refused", "undocumented", "hangs", "peak MB", "seconds"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        table.add_row(
            outcome.reader,
            f"{outcome.inputs:,}",
            f"{outcome.accepted:,}",
            f"{outcome.refused.total():,}",
            f"{sum(map(len, outcome.found.values())) - outcome.hangs:,}",
            f"{outcome.hangs:,}",
            f"{outcome.peak_bytes / 1e6:,.0f}",
            f"{outcome.seconds:,.0f}",
        )
    return table


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # counts are shown then as well
    sys.exit(main())
