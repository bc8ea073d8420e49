"""Make the environment of a row: torch once per version, everything else for the row alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from reliability.matrix.rows import Row

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".matrix"
"""Environments and results; ignored by git."""

TOOLS = ("pytest", "pytest-xdist", "onnxslim", "scikit-learn")
"""What the tests need beside the project."""

SHOWN = ("torch", "lightning", "numpy", "onnx", "onnxruntime", "onnx-ir", "onnxscript", "protobuf")
"""Versions in the table."""


class NotHere(Exception):
    """A row cannot be tried on this machine; its text says why."""


def environment(row: Row, *, cuda: bool) -> Path:
    """The interpreter of a row's environment, which is made if it is missing.

    Args:
        row: The row.
        cuda: Also install a torch that brings CUDA, some gigabytes.

    Raises:
        NotHere: There is no such interpreter, or only a build of torch with CUDA.
        subprocess.CalledProcessError: pip could not install it; what pip printed has been shown.
    """
    folder = HOME / re.sub(r"[^\w.]+", "-", row.name)
    python = folder / "bin" / "python"
    finished = folder / "finished"
    pins = _torch(row)
    if finished.is_file() and finished.read_text(encoding="utf-8") == repr(row):
        return python
    interpreter = _interpreter(row.python)
    shared = _torch_layer(interpreter, pins, row, cuda=cuda)
    shutil.rmtree(folder, ignore_errors=True)
    _venv(interpreter, folder)
    # The row's own packages stand before those that it shares.
    (_packages(folder, row) / "shared.pth").write_text(f"{_packages(shared, row)}\n")
    with tempfile.TemporaryDirectory() as scratch:
        limits = Path(scratch) / "constraints.txt"
        limits.write_text("\n".join(constraints(row)), encoding="utf-8")
        project = f"{ROOT}[{','.join(row.extras)}]"
        upgrade = () if row.constrained else ("--upgrade", "--upgrade-strategy", "eager")
        _pip(python, ["install", "-c", limits, *upgrade, *row.pins, pins, *TOOLS, "-e", project])
    finished.write_text(repr(row), encoding="utf-8")
    return python


def constraints(row: Row) -> list[str]:
    """Lines of ``constraints.txt`` that say nothing about what the row pins."""
    if not row.constrained:
        return []
    own = {_name(pin) for pin in row.pins}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and line[0] != "#" and _name(line) not in own]


def versions(python: Path) -> dict[str, str]:
    """What is installed of ``SHOWN``."""
    code = (
        "import json, sys\n"
        "from importlib.metadata import version\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    found: dict[str, str] = json.loads(_output([python, "-c", code, *SHOWN]))
    return found


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def _torch(row: Row) -> str:
    lines = (*row.pins, *constraints(row), "torch")
    return next(line for line in lines if _name(line) == "torch")


def _interpreter(version: str) -> str:
    """An interpreter on the path, or of pyenv.

    Raises:
        NotHere: There is none.
    """
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    for found in (shutil.which(f"python{version}"), *map(str, pyenv)):
        if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return found
    raise NotHere(f"no python{version}")


def _torch_layer(interpreter: str, pin: str, row: Row, *, cuda: bool) -> Path:
    """An environment with nothing but torch, which rows with the same one share."""
    folder = HOME / re.sub(r"[^\w.]+", "-", f"{row.python} {pin}")
    finished = folder / "finished"
    if finished.is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    _venv(interpreter, folder)
    python = folder / "bin" / "python"
    plan: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--report",
        "-",
        pin,
    ]
    report = json.loads(_output(plan))
    names = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    if not cuda and any(_name(name).startswith("nvidia-") for name in names):
        raise NotHere(f"pip finds torch {names['torch']} with CUDA alone")
    _pip(python, ["install", pin])
    finished.touch()
    return folder


def _venv(interpreter: str, folder: Path) -> None:
    subprocess.run([interpreter, "-m", "venv", folder], check=True)


def _packages(folder: Path, row: Row) -> Path:
    scheme = {"base": str(folder), "platbase": str(folder), "py_version_short": row.python}
    return Path(sysconfig.get_path("purelib", "posix_prefix", scheme))


def _pip(python: Path, arguments: Sequence[str | Path]) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "--quiet", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(done.stdout)
        done.check_returncode()


def _output(command: Sequence[str | Path]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
