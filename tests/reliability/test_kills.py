"""The short form of ``python -m reliability.kills``, in a process whose forks take no threads."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_few_kills_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reliability.kills", "--count", "3", "--seed", "7"]
    run = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 processes killed" in run.stdout
    assert "1 of 1 finished runs equal the uninterrupted one to the bit\n0 problems" in run.stdout
