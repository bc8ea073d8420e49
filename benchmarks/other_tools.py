"""QDQ files of other tools, made here, converted and compared.

    python -m benchmarks.other_tools                        # every tool that is installed
    python -m benchmarks.other_tools --tool brevitas nncf
    python -m benchmarks.other_tools --list                 # tools, and how to install them
    python -m benchmarks.other_tools --json                 # one line per file

Each tool quantizes twelve small networks (residual, depthwise, MLP, batch norm with relu6, grouped,
dilated, transposed, 1-D, 3-D, attention, LSTM) by its usual options and writes ONNX files.
``convert_qat_model`` converts each. ONNX Runtime runs the file as it is written; the executor runs
the deploy model; every tensor that the file quantizes, and its outputs, are compared in steps of
their grids: first with ``float_bias=True``, where only float32's order of summation differs, then
as by default, with biases rounded to the accumulator's step. A file whose tool writes no integers
(FP8) must be refused with what to do instead.

A tool whose pins conflict with this project has an environment of its own. Make its files there,
with this repository on PYTHONPATH, and read them here:

    python -m venv /tmp/tf && /tmp/tf/bin/pip install tensorflow-cpu tf-keras tf2onnx ...
    PYTHONPATH=. /tmp/tf/bin/python -m benchmarks.other_tools --tool tflite --make --folder files
    python -m benchmarks.other_tools --folder files

Exit code: 0; 1 if a file was not converted, or lint finds an error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.row_process import RowFailed, RowProcess, reason
from benchmarks.tool_files.tool import TOOLS

LIMIT = 1800.0
_MADE = "made.jsonl"

Line = Mapping[str, Any]


def make(tool: str, folder: Path) -> Iterator[None]:
    """In a process of its own: write a tool's files, and beside them what became of each."""
    import warnings

    import onnx

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = [{"versions": TOOLS[tool].versions()}]
    for name, write in TOOLS[tool].files():
        line, path = {"file": name}, folder / f"{name}.onnx"
        try:
            write(path)
            if not any("Quantize" in node.op_type for node in onnx.load(path).graph.node):
                path.unlink()
                line["not made"] = "the tool quantizes nothing in it"
        except Exception as error:  # the tool's own
            path.unlink(missing_ok=True)
            line["not made"] = reason(error)
        lines.append(line)
    (folder / _MADE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    yield


def convert(folder: Path, grid_weights: bool) -> Iterator[list[dict[str, Any]]]:
    """In a process of its own: one line per file that a tool was asked for."""
    from benchmarks.tool_files.compare import compared

    lines = [json.loads(line) for line in (folder / _MADE).read_text().splitlines()[1:]]
    for line in lines:
        if "not made" not in line:
            with tempfile.TemporaryDirectory() as place:
                try:
                    line |= compared(folder / f"{line['file']}.onnx", Path(place), grid_weights)
                except Exception as error:
                    line["error"] = reason(error)
    yield lines


def in_process(target: Any, *arguments: Any) -> Any:
    """What a function gives from a process of its own.

    Raises:
        RowFailed: It raised, died, or took too long.
    """
    process = RowProcess(target, *arguments)
    try:
        return process.answer(time.monotonic() + LIMIT)
    finally:
        process.stop()


def row(tool: str, versions: str, lines: Sequence[Line]) -> str:
    """One line of the table."""
    made = [line for line in lines if "not made" not in line]
    done = [line for line in made if "error" not in line]
    if TOOLS[tool].refused:
        return f"| {TOOLS[tool].name}: {versions} | {len(made)} | refused | | | | | |"
    layers = sum(line["layers"] for line in done)
    most = [max((line[key] for line in done), default=0.0) for key in ("float_bias", "steps")]
    tensors = sum(line["tensors"] for line in done)
    errors = sum(len(line["lint"]) for line in done)
    cells = [f"{TOOLS[tool].name}: {versions}", len(made), len(done), layers, tensors]
    cells += [f"{steps:.2f}" for steps in most]
    return f"| {' | '.join(map(str, [*cells, errors]))} |"


def remarks(tool: str, lines: Sequence[Line]) -> Iterator[str]:
    """What went wrong, by file, and what the tool itself did not write."""
    for line in lines:
        where = f"{tool}/{line['file']}"
        if "not made" in line:
            yield f"{where} is not written: {line['not made']}"
        elif "error" in line:
            yield f"{where} is refused: {line['error']}"
        elif TOOLS[tool].refused:
            yield f"{where} must be refused and is converted"
        for found in line.get("lint", ()):
            yield f"{where}: lint: {found}"


def is_right(tool: str, lines: Sequence[Line]) -> bool:
    """Whether all that the tool wrote came through, or was refused with a remedy."""
    made = [line for line in lines if "not made" not in line]
    if TOOLS[tool].refused:
        return all("error" in line for line in made)
    return not any("error" in line or line["lint"] for line in made)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tool", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--folder", type=Path, help="keep the files here; read those that are here")
    parser.add_argument("--make", action="store_true", help="write the files, convert nothing")
    parser.add_argument("--json", action="store_true", help="one line of JSON per file")
    parser.add_argument("--list", action="store_true", help="print the tools, run nothing")
    options = parser.parse_args(arguments)
    if options.make and options.folder is None:
        parser.error("--make needs --folder, where the files stay")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # TensorFlow Model Optimization needs it.
    if options.list:
        for name in options.tool:
            tool = TOOLS[name]
            print(f"{name}: {tool.versions() or 'not installed; ' + tool.install}")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        return _run(options, options.folder or Path(temporary))


def _run(options: argparse.Namespace, folder: Path) -> int:
    """Make and convert, tool by tool."""
    right, said = True, list[str]()
    if not options.json and not options.make:
        print(
            "| tool | files | converted | layers on integers | tensors | steps, float biases | "
            "steps | lint errors |"
        )
        print("|---" * 8 + "|", flush=True)
    for tool in options.tool:
        made = folder / tool / _MADE
        if not made.exists() and TOOLS[tool].versions() is None:
            said.append(f"{tool} is not installed: {TOOLS[tool].install}")
            continue
        try:
            if not made.exists():
                in_process(make, tool, folder / tool)
            if options.make:
                continue
            lines = in_process(convert, folder / tool, TOOLS[tool].grid_weights)
        except RowFailed as failed:
            right = False
            said.append(f"{tool}: {failed}\n{failed.details}")
            continue
        versions = json.loads(made.read_text().splitlines()[0])["versions"]
        right &= is_right(tool, lines)
        if options.json:
            for line in lines:
                print(json.dumps({"tool": tool, "versions": versions, **line}), flush=True)
        else:
            print(row(tool, versions, lines), flush=True)
        said += remarks(tool, lines)
    if not options.json:
        print("\n" + "\n".join(said))
    return int(not right)


if __name__ == "__main__":
    raise SystemExit(main())
