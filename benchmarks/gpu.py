"""Everything that only a GPU can tell, in one run of less than ten minutes on one card.

    python -m benchmarks.gpu                       # on a machine with a CUDA card
    python -m benchmarks.gpu                       # again: goes on with the rows that were left out
    python -m benchmarks.gpu --list                # the rows in their order, nothing is run
    python -m benchmarks.gpu --rows 'resnet50 256/bf16/*'
    python -m benchmarks.gpu --device cpu --tiny   # tries the script on a CPU, within a minute

It needs torch with CUDA and this repository. In this order it

1. measures quantizers on one tensor: bandwidth over that of a copy, forward and backward;
2. runs the tests that need a card (`pytest -m cuda`), if pytest is there;
3. measures training steps over the float step, and their peak of memory, of ResNet-50, MobileNetV2,
   a ViT-S-like encoder and a ConvNeXt-T-like network on 224 x 224 images: bf16-mixed with
   channels_last, then float32 with TF32; eager, compiled (torch.compile), with CUDA graphs
   (mode="reduce-overhead"); ours with ranges frozen, observed and learned and in the compact form,
   and every peer that is installed. Compilation takes most of the time: the first run leaves
   compiled rows out, and names them.

Each row of training steps has a process of its own: what runs out of memory, crashes or hangs
costs that row, and the table says why. After each row the results are written to a JSON file. A run
of the same commit, torch and card leaves alone what the file has, failures too; --fresh begins
anew. At the end tables in Markdown are printed, for docs/benchmarks.md.

Exit code: 0; 1 if a test failed; 2 if there is no card or the file of results is not one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.on_gpu.bandwidth import CASES, DTYPES, SIZES, measured
from benchmarks.on_gpu.nets import NETS
from benchmarks.on_gpu.results import ROOT, TESTS_ROW, Results, bandwidth_name, facts
from benchmarks.on_gpu.steps import (
    FLOAT,
    LAYERS_ONLY,
    OWN,
    PRECISIONS,
    Config,
    Float,
    peer_variants,
    touches_device,
)
from benchmarks.row_process import RowFailed, RowProcess, choose_start, preload

LIMITS: Mapping[str, float] = {"eager": 90.0, "compiled": 240.0, "graphs": 240.0}
"""Seconds after which a row of training steps is given up."""

EXPECTED: Mapping[str, float] = {"eager": 12.0, "compiled": 60.0, "graphs": 60.0}
"""Seconds that such a row takes until one has shown it: a row is not begun with less time left."""

TESTS, JOB = 180.0, 20.0
"""Seconds for the tests, and for one tensor."""


def bandwidth_jobs() -> dict[str, tuple[str, str, str]]:
    """The rows of single tensors by name: size, dtype and case."""
    return {
        bandwidth_name(size, dtype, case): (size, dtype, case)
        for size in SIZES
        for dtype in DTYPES
        for case in CASES
    }


def by_importance() -> Iterator[tuple[Config, list[str]]]:
    """Configurations with variants, the most telling ones first; later ones repeat some."""
    nets = [(net, batch) for net in NETS for batch in NETS[net].batches]
    # Of every network one size of the batch, then the others.
    nets.sort(key=lambda one: one[1] != NETS[one[0]].batches[0])
    peers = [LAYERS_ONLY, *peer_variants()]
    yield Config(*nets[0], "bf16", "eager"), [FLOAT, *OWN, *peers]
    yield Config(*nets[0], "bf16", "compiled"), [FLOAT, *OWN[:2]]
    yield Config(*nets[0], "bf16", "graphs"), [FLOAT, *OWN[:1]]
    for precision in PRECISIONS:
        for net in nets:
            yield Config(*net, precision, "eager"), [FLOAT, *OWN, *peers]
    for variants in ([FLOAT, *OWN], peers):
        for precision in PRECISIONS:
            for net in nets:
                for mode in ("compiled", "graphs"):
                    yield Config(*net, precision, mode), variants


def all_names() -> list[str]:
    """Every row in the order in which they are measured."""
    steps = [f"{config.name}/{variant}" for config, some in by_importance() for variant in some]
    return list(dict.fromkeys([*bandwidth_jobs(), TESTS_ROW, *steps]))


def files_with_cuda_tests() -> list[str]:
    """Only these are collected: to import all tests takes longer than to run these."""
    return [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.cuda" in path.read_text(encoding="utf-8")
    ]


class Run:
    """One run of the script.

    Args:
        options: The command line's.
        results: Where rows go.
    """

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self.options, self.results = options, results
        self.deadline: float = time.monotonic() + 60 * options.minutes
        self.expected = {mode: s / 10 if options.tiny else s for mode, s in EXPECTED.items()}

    def all(self) -> None:
        """Everything, as far as the time goes."""
        self.bandwidths()
        self.tests()
        for config, variants in by_importance():
            self.steps(config, variants)

    def wanted(self, names: list[str]) -> list[str]:
        """The rows among these that were asked for and are not there yet."""
        found = [name for name in names if fnmatch(name, self.options.rows)]
        return [name for name in found if name not in self.results.rows]

    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    def until(self, limit: float) -> float:
        """The time at which a row that begins now is given up."""
        return min(time.monotonic() + limit, self.deadline)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row and print it."""
        self.results.add(name, row)
        values = {key: value for key, value in row.items() if key != "details"}
        shown = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{name}: {', '.join(shown)}", flush=True)

    def failed(self, name: str, error: RowFailed, until: float) -> None:
        """Keep why a row cannot be measured, unless only the run's own time was over."""
        if error.in_time or until < self.deadline:
            self.add(name, {"error": str(error), "details": error.details})

    def bandwidths(self) -> None:
        """One tensor: a process for all rows, and another one after a row that failed."""
        jobs = bandwidth_jobs()
        names = self.wanted(list(jobs))
        while names and self.left() > 0:
            rest = [jobs[name] for name in names]
            process = RowProcess(measured, rest, self.options.device, self.options.tiny)
            try:
                while names and self.left() > 0 and not process.failed:
                    name, until = names.pop(0), self.until(JOB)
                    try:
                        self.add(name, process.answer(until))
                    except RowFailed as error:
                        self.failed(name, error, until)
            finally:
                process.stop()

    def tests(self) -> None:
        """The tests that need a card, in a process of their own."""
        if not self.wanted([TESTS_ROW]) or self.left() < TESTS / 10:
            return
        command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
        until = self.until(TESTS)
        try:
            done = subprocess.run(
                [*command, *files_with_cuda_tests()],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=max(until - time.monotonic(), 1.0),
            )
        except subprocess.TimeoutExpired as over:
            text = (over.stdout or b"").decode(errors="replace")[-4000:]
            error = RowFailed(f"not ready after {TESTS:.0f} s", text, in_time=False)
            self.failed(TESTS_ROW, error, until)
            return
        printed = done.stdout.strip() or done.stderr.strip() or "nothing was printed"
        summary = printed.splitlines()[-1].strip("= ")
        if done.returncode == 0:
            self.add(TESTS_ROW, {"summary": summary})
            return
        failures = re.findall(r"^(?:FAILED|ERROR) .*$", printed, flags=re.MULTILINE)
        row = {"error": "; ".join([summary, *failures]), "details": printed[-8000:]}
        self.add(TESTS_ROW, row)

    def steps(self, config: Config, variants: list[str]) -> None:
        """Training steps of one network in one precision and one mode."""
        wanted = [v for v in variants if self.wanted([f"{config.name}/{v}"])]
        while wanted:
            limit = self.until(LIMITS[config.mode])
            if self.left() < 2 * self.expected[config.mode]:
                return
            try:
                base = Float(config, self.options.device, self.options.tiny, limit)
            except RowFailed as error:
                # Every other variant would wait for it as long.
                for variant in wanted:
                    beside = "" if variant == FLOAT else "no float step beside it: "
                    failed = RowFailed(f"{beside}{error}", error.details, in_time=error.in_time)
                    self.failed(f"{config.name}/{variant}", failed, limit)
                return
            try:
                while wanted and not base.process.failed:
                    self.step(base, wanted.pop(0))
            finally:
                base.process.stop()

    def step(self, base: Float, variant: str) -> None:
        """The row of one variant beside float."""
        mode, name = base.config.mode, f"{base.config.name}/{variant}"
        start, until = time.monotonic(), self.until(LIMITS[mode])
        if variant == FLOAT:
            self.add(name, base.row)
        elif self.left() > self.expected[mode]:
            try:
                self.add(name, base.compared(variant, until))
                self.expected[mode] = time.monotonic() - start
            except RowFailed as error:
                self.failed(name, error, until)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, help="time for all of it (default: 9; with --tiny: 0.9)")
    add("--rows", default="*", metavar="PATTERN", help="only rows whose name fits; see --list")
    add("--list", action="store_true", help="print the names of all rows in their order")
    add("--fresh", action="store_true", help="measure rows again that the file has")
    file = Path("gpu_benchmark.json")
    add("--json", type=Path, default=file, metavar="FILE", help=f"results (default: {file})")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--tiny", action="store_true", help="narrow networks and small tensors: no measurement")
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = 0.9 if options.tiny else 9.0
    if options.device == "cpu" and not options.tiny:
        parser.error(
            "--device cpu must come with --tiny: it tries the script and measures nothing."
        )
    if options.rows != "*" and not any(fnmatch(name, options.rows) for name in all_names()):
        parser.error(f"--rows must fit a row; {options.rows!r} fits none. --list prints all rows.")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns its exit code."""
    options = options_of(arguments)
    if options.list:
        print(*all_names(), sep="\n")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        print(
            "This script needs a CUDA card and a torch that was built for it; "
            + ("torch finds no card here" if built else f"torch {torch.__version__} has no CUDA")
            + ". Run it on a machine with a card (nvidia-smi lists it) and pip's torch for Linux, "
            "or try the script itself here: python -m benchmarks.gpu --device cpu --tiny",
            file=sys.stderr,
        )
        return 2
    try:
        results = Results(options.json, facts(options.device, options.tiny), fresh=options.fresh)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    known = len(results.rows)
    if known:
        print(f"{known} rows are in {options.json} already; --fresh would measure them again.")
    run = Run(options, results)
    if options.device == "cuda":
        preload("benchmarks.on_gpu.steps", "benchmarks.on_gpu.bandwidth", "torch._dynamo")
        choose_start(touches_device)
    try:
        run.all()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here.")
    print("", results.markdown(), sep="\n")
    left_out = run.wanted(all_names())
    if left_out:
        print(f"\nLeft out for time ({len(left_out)} rows); the same command goes on with them:")
        groups: dict[str, list[str]] = {}
        for name in left_out:
            group, _, last = name.rpartition("/")
            groups.setdefault(group, []).append(last)
        print(*(f"  {group}: {'; '.join(some)}" for group, some in groups.items()), sep="\n")
    print(f"\nAll of it is in {options.json}.")
    return int("error" in results.rows.get(TESTS_ROW, {}))


if __name__ == "__main__":
    sys.exit(main())
