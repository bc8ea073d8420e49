"""What `benchmarks.gpu` has measured: a JSON file, written after every row, and its tables."""

from __future__ import annotations

import datetime
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks.on_gpu.bandwidth import CASES, DTYPES, SIZES
from benchmarks.on_gpu.nets import NETS
from benchmarks.on_gpu.steps import FLOAT, MODES, PRECISIONS
from lightning_qat.atomic_write import replacing

ROOT = Path(__file__).parents[2]

IDENTITY = ("commit", "sources", "torch", "triton", "card", "narrow")
"""What two runs must have in common for one to continue the other."""

TESTS_ROW = "tests"

Row: TypeAlias = dict[str, Any]


def facts(device: str, narrow: bool) -> dict[str, Any]:
    """What the numbers of a run depend on."""
    card = torch.cuda.get_device_name() if device == "cuda" else "no card, a CPU"
    return {
        "commit": _commit(),
        # A commit says nothing of changes that were not committed.
        "sources": _digest(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": sys.version.partition(" ")[0],
        "card": card,
        "narrow": narrow,
        "date": _now(),
    }


def bandwidth_name(size: str, dtype: str, case: str) -> str:
    """The name of a row of the table of bandwidths."""
    return f"bandwidth/{size}/{dtype}/{case}"


class Results:
    """The rows of a run by name, kept in a file that holds earlier runs as well.

    Args:
        file: A JSON file; it need not exist.
        facts: See ``facts``. The last run of the file is continued if it has the same ones.
        fresh: Begin a new run all the same.

    Raises:
        ValueError: The file holds something else.
    """

    def __init__(self, file: Path, facts: Mapping[str, Any], *, fresh: bool) -> None:
        self.file = file
        self._runs = _runs_of(file)
        last = self._runs[-1] if self._runs else None
        same = last is not None and all(last.get(key) == facts[key] for key in IDENTITY)
        if fresh or not same:
            self._runs.append({**facts, "rows": {}})
        self.run = self._runs[-1]
        self.rows: dict[str, Row] = self.run["rows"]

    def add(self, name: str, row: Row) -> None:
        """Add a row and write the file: a reader sees the old one or the new one."""
        self.rows[name] = {**row, "date": _now()}
        with replacing(self.file) as path:
            path.write_text(json.dumps({"runs": self._runs}, indent=1) + "\n")

    def markdown(self) -> str:
        """All tables, for ``docs/benchmarks.md``."""
        run = self.run
        lines = [
            f"{run['card']}, torch {run['torch']}, Triton {run['triton']}, Python {run['python']}; "
            f"commit {run['commit']}, {run['date'][:10]}."
        ]
        if run["narrow"]:
            lines += [
                "",
                "Narrow networks and small tensors: a trial of the script, no measurement.",
            ]
        for part in (self._tests(), self._bandwidths(), *self._steps(), self._failures()):
            if part:
                lines += ["", *part]
        return "\n".join(lines)

    def _tests(self) -> list[str]:
        row = self.rows.get(TESTS_ROW)
        if row is None:
            return []
        return [f"Tests that need CUDA: {row.get('error', row.get('summary'))}."]

    def _bandwidths(self) -> list[str]:
        columns = [(size, dtype) for dtype in DTYPES for size in SIZES]
        found = {
            case: [self.rows.get(bandwidth_name(*column, case)) for column in columns]
            for case in CASES
        }
        if not any(any(rows) for rows in found.values()):
            return []
        copies = [
            next((row["copy"] for rows in found.values() if (row := rows[i]) and "copy" in row), 0)
            for i in range(len(columns))
        ]
        return [
            "Bandwidth over that of a copy, forward and backward:",
            "",
            "| | " + " | ".join(f"{dtype}, {size}" for size, dtype in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
            "| copy | " + " | ".join(f"{copy / 1e9:.0f} GB/s" for copy in copies) + " |",
            *(
                f"| {case} | " + " | ".join(map(_bandwidth, rows)) + " |"
                for case, rows in found.items()
                if any(rows)
            ),
        ]

    def _steps(self) -> Iterator[list[str]]:
        titles = {
            f"{net} {b}": f"{NETS[net].title}, batch {b}" for net in NETS for b in NETS[net].batches
        }
        for precision, title in PRECISIONS.items():
            for mode in MODES:
                # Of every network its rows by variant.
                found: dict[str, dict[str, Row]] = {}
                for name, row in self.rows.items():
                    if f"/{precision}/{mode}/" in name:
                        net, _, _, variant = name.split("/", 3)
                        found.setdefault(net, {})[variant] = row
                if found:
                    nets = [net for net in titles if net in found]
                    names = dict.fromkeys(v for net in nets for v in found[net] if v != FLOAT)
                    yield [
                        f"{title}, {mode}: time of a step over float's (quartiles), peak of memory "
                        "over float's:",
                        "",
                        "| | " + " | ".join(titles[net] for net in nets) + " |",
                        "|---" * (len(nets) + 1) + "|",
                        *(
                            f"| {variant} | "
                            + " | ".join(_step(found[net].get(variant)) for net in nets)
                            + " |"
                            for variant in (FLOAT, *names)
                        ),
                    ]

    def _failures(self) -> list[str]:
        failed = [f"- {name}: {row['error']}" for name, row in self.rows.items() if "error" in row]
        return ["What failed:", "", *failed] if failed else []


def _bandwidth(row: Row | None) -> str:
    if row is None or "error" in row:
        return "" if row is None else "failed"
    ratios = [row[key] for key in ("forward", "backward") if key in row]
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def _step(row: Row | None) -> str:
    if row is None or "error" in row:
        return "" if row is None else "failed"
    if "ratio" not in row:
        peak = f", {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
        return f"{row['ms']:.1f} ms{peak}"
    peak = f", {row['peak']:.2f}" if "peak" in row else ""
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}){peak}"


def _runs_of(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"]
        if all(isinstance(run["rows"], dict) for run in runs):
            return runs
    except (ValueError, LookupError, TypeError):
        pass
    raise ValueError(
        f"{file} must be a file that this script has written; it holds something else. Name "
        "another one with --json, or remove it."
    )


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _digest() -> str:
    digest = hashlib.sha256()
    for folder in ("lightning_qat", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
