"""A quiet trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    def make(*callbacks: L.Callback, **options: Any) -> L.Trainer:
        defaults: dict[str, Any] = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return make
