"""Write files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well.

    The temporary file stands in a folder of its own, so that a writer may put more files beside it
    (external data); only files whose name starts with the final name are moved.

    Args:
        path: The file to write; its folder is made when it is missing.

    Raises:
        OSError: The folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        # The file itself last: whoever sees it finds what it refers to.
        for extra in sorted(Path(folder).iterdir(), key=lambda p: p.name == path.name):
            os.replace(extra, path.with_name(extra.name))
