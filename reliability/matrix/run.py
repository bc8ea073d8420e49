"""Test one row in its environment."""

from __future__ import annotations

import os
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from reliability.matrix.environment import ROOT, NotHere, environment, versions
from reliability.matrix.parts import paths
from reliability.matrix.results import Result, state
from reliability.matrix.rows import Row


def run(row: Row, *, cuda: bool) -> Result:
    """Make the environment, run the tests, and say what they gave.

    Args:
        row: The row.
        cuda: Also with a torch that brings CUDA.

    Raises:
        subprocess.CalledProcessError: The environment cannot be made.
    """
    result = Result(row.name, state(row))
    try:
        python = environment(row, cuda=cuda)
    except NotHere as reason:
        result.not_here = f"not here: {reason}"
        return result
    result.versions = versions(python)
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # Else a PYTHONPATH of the caller would bring packages of another environment.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command: list[str | Path] = [
            python,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-q",
            f"--junitxml={report}",
        ]
        done = subprocess.run([*command, *paths(row.parts)], cwd=ROOT, env=kept | one)
        if not report.is_file():
            result.failed = [f"pytest ended with {done.returncode} and no report"]
            return result
        _count(ElementTree.parse(report).getroot(), result)
    return result


def _count(report: ElementTree.Element, result: Result) -> None:
    for case in report.iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed.append(name)
        elif case.find("skipped") is not None:
            result.skipped += 1
        else:
            result.passed += 1
    result.seconds = sum(float(suite.get("time", 0)) for suite in report.iter("testsuite"))
