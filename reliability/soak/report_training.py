"""The table of the fits."""

from __future__ import annotations

import numpy as np

from reliability.soak.memory import MB
from reliability.soak.training import EVERY, Run, Seen, fit_apart

LARGEST_GROWTH = 0.01
"""Of resident memory after everything has settled."""


def runs(steps: int) -> dict[str, Run]:
    """The fits, by their names in the table."""
    settle = min(1_000, steps // 10)
    return {
        "float, for comparison": Run(steps, settle, qat=False),
        "one process": Run(steps, settle),
        "one process, progress bar": Run(steps, settle, bar=True),
        "one process, compiled": Run(steps, settle, compiled=True),
        "two processes (DDP, gloo)": Run(steps, settle, processes=2),
    }


def report_training(steps: int) -> bool:
    """Fit, print a row each; whether memory and time are flat."""
    heads = ("fit", "steps", "MB at step", "MB at the end", "growth", "live tensors")
    print(f"| {' | '.join(heads)} | ms of CPU a step, change | calls a step |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    right = True
    for name, run in runs(steps).items():
        seen = fit_apart(run)
        print(row(name, run, seen), flush=True)
        right &= flat(run, seen)
    return right


def flat(run: Run, seen: Seen) -> bool:
    """Whether neither memory nor the work of a step grows.

    The time is printed beside it, and not judged: on a machine with other work it follows that.
    """
    calls = seen.calls[run.settle // EVERY :]
    return seen.growth(run) < LARGEST_GROWTH and max(calls) <= 1.01 * calls[0]


def row(name: str, run: Run, seen: Seen) -> str:
    """A row of the table."""
    settled = run.settle // EVERY
    time = seen.step_time(run)
    calls = seen.calls[settled:]
    interval = f"{time.low / time.level:+.1%} to {time.high / time.level:+.1%}"
    cells = (
        name,
        f"{run.steps:,}",
        f"{seen.memory[settled] / MB:.1f} at {run.settle:,}",
        f"{seen.memory[-1] / MB:.1f}",
        f"{seen.growth(run):+.2%}",
        f"{seen.tensors[settled]} to {seen.tensors[-1]}, most {max(seen.tensors[settled:])}",
        f"{np.median(seen.seconds) * 1e3:.2f}, {time.relative:+.1%} ({interval})",
        f"{calls[0]} to {calls[-1]}",
    )
    return f"| {' | '.join(cells)} |"
