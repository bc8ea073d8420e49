"""Run commands as a shell does, and the checkpoints that they read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lightning_qat import cli
from tests.cli.checkpoints import write_checkpoint
from tests.models import trained
from tests.tiny_module import TinyModule


class Done(NamedTuple):
    """What a command did.

    Args:
        code: Its exit code.
        out: What it printed.
        err: What it printed on the standard error.
    """

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, as JSON."""
        return json.loads(self.out)


Command = Callable[..., Done]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the program with arguments."""

    def command(*arguments: object) -> Done:
        capfd.readouterr()  # what the test has printed before
        try:
            code = cli.main([*map(str, arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capfd.readouterr())

    return command


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a ``TinyModule`` of width 6."""
    module: Any = trained(TinyModule(width=6), torch.randn(4, 1, 8, 8))
    return write_checkpoint(tmp_path / "last.ckpt", module)
