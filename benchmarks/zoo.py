"""Architectures that we did not write, each from float to every target's file.

    python -m benchmarks.zoo                        # all; hours on a small machine
    python -m benchmarks.zoo --only 'transformers/*' 'timm/vit*'
    python -m benchmarks.zoo                        # again: goes on with what is missing
    python -m benchmarks.zoo --fresh --only written/yolo
    python -m benchmarks.zoo --table                # what the results hold, in Markdown
    python -m benchmarks.zoo --list

It needs timm, torchvision, transformers and segmentation_models_pytorch (pip install
'lightning-qat[zoo]'). Models are small, with random weights: this checks that they come through
and what their files compute, not their accuracy. For each one: prepare, three training steps,
convert, every target, verify; then the products of each file are counted in the file, and what is
float there must be named by the report or the export.

Each architecture has a process of its own with a time limit. Each stage is a line of JSON in the
results, so that a crash or the limit costs what comes after. --jobs runs several at once.

Exit code: 0; 1 if an architecture did not come through all its stages.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.row_process import RowFailed, RowProcess, preload
from benchmarks.zoo_models import all_architectures

TARGETS = ("fake_quant_onnx", "cann", "tflite")
STAGES = ("build", "float step", "prepare", "train", "convert")
RESULTS = Path("zoo.jsonl")
LIMIT = 600.0


def answers(name: str, targets: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """In a process of its own: what each stage of one architecture finds."""
    import torch

    from benchmarks.zoo_models import libraries
    from benchmarks.zoo_models.row import stages

    assert libraries  # torchvision's operators are declared
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for stage, found in stages(all_architectures()[name], targets, Path(folder)):
            yield {"stage": stage, **found}


def row(name: str, targets: Sequence[str], limit: float) -> list[dict[str, Any]]:
    """Run one architecture in a process of its own; what each stage found, failures too."""
    began, lines = time.monotonic(), list[dict[str, Any]]()
    process = RowProcess(answers, name, tuple(targets))
    try:
        for _ in (*STAGES, *targets):
            lines.append({"name": name, **process.answer(began + limit)})
    except RowFailed as failed:
        where = failed.details.splitlines()[-12:]
        stage = (*STAGES, *targets)[len(lines)]
        lines.append({"name": name, "stage": stage, "error": str(failed), "details": where})
    finally:
        process.stop()
    lines.append({"name": name, "stage": "end", "seconds": round(time.monotonic() - began, 1)})
    return lines


def failures(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What went wrong, one entry per stage."""
    return [f"{line['stage']}: {line['error']}" for line in lines if "error" in line]


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by architecture, of those that came to their end."""
    found: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if line["stage"] == "build" and line["name"] in found:
                found[line["name"]] = []
            found.setdefault(line["name"], []).append(line)
    return {name: lines for name, lines in found.items() if lines[-1]["stage"] == "end"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines (zoo.jsonl)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one architecture")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at once")
    parser.add_argument("--fresh", action="store_true", help="run what has results as well")
    parser.add_argument("--table", action="store_true", help="print the results, run nothing")
    parser.add_argument("--list", action="store_true", help="print the names, run nothing")
    options = parser.parse_args(arguments)
    names = [n for n in all_architectures() if any(fnmatch(n, p) for p in options.only)]
    if not names:
        parser.error(f"no architecture matches {options.only}; --list names them")
    if options.list:
        print("\n".join(names))
        return 0
    known = read(options.results)
    if options.table:
        from benchmarks.zoo_models.table import table

        print(table({name: known[name] for name in names if name in known}))
        return 0
    wanted = [name for name in names if options.fresh or name not in known]
    failed = 0
    preload("benchmarks.zoo_models.libraries")
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = pool.map(lambda name: row(name, options.targets, options.limit), wanted)
        for number, (name, lines) in enumerate(zip(wanted, rows, strict=True), 1):
            with options.results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            wrong = failures(lines)
            failed += bool(wrong)
            said = "; ".join(wrong)[:300] or "through all stages"
            print(
                f"[{number}/{len(wanted)}] {name} ({lines[-1]['seconds']:.0f} s): {said}",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
