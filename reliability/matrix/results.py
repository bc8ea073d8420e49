"""What rows gave: kept between runs, and shown as a table."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from reliability.matrix.environment import HOME, ROOT, SHOWN
from reliability.matrix.rows import Row

_FILE = HOME / "results.json"


@dataclass
class Result:
    """What a row gave.

    Args:
        row: Its name.
        state: What was tested: the row, and git's names of the code and the tests.
        versions: Packages of ``SHOWN``, by name; empty if the row was not tried.
        passed: Tests.
        skipped: Tests.
        failed: Names of tests.
        seconds: Of the tests.
        not_here: Why the row was not tried; empty if it was.
    """

    row: str
    state: str
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0
    not_here: str = ""

    @property
    def good(self) -> bool:
        """The row was tried, and nothing failed."""
        return bool(self.passed) and not self.failed


def state(row: Row) -> str:
    """Tells whether an earlier result of a row still holds."""
    tracked = ("lightning_qat", "exporters", "tests", "constraints.txt", "pyproject.toml")
    command = ["git", "-C", str(ROOT), "rev-parse", *(f"HEAD:{name}" for name in tracked)]
    return f"{row!r} {subprocess.run(command, capture_output=True, text=True).stdout}"


def earlier(path: Path = _FILE) -> dict[str, Result]:
    """Results of earlier runs, by row."""
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {entry["row"]: Result(**entry) for entry in stored}


def keep(result: Result, path: Path = _FILE) -> None:
    """Store a result in the place of an earlier one of its row."""
    kept = earlier(path) | {result.row: result}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(r) for r in kept.values()], indent=1), encoding="utf-8")


def table(results: Iterable[Result]) -> str:
    """A table in Markdown."""
    heads = ("row", "result", *SHOWN, "seconds")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for result in results:
        said = result.not_here or (
            f"{len(result.failed)} failed, {result.passed} passed"
            if result.failed
            else f"{result.passed} passed, {result.skipped} skipped"
        )
        cells = (result.row, said, *(result.versions.get(name, "") for name in SHOWN))
        lines.append(f"| {' | '.join(cells)} | {result.seconds:.0f} |")
    return "\n".join(lines)
