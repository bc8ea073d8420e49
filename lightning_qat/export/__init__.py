"""What an exporter is, how one is found, and what all must prove; contains no file format."""

from lightning_qat.export.export import export
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import (
    Artifact,
    CannotExpress,
    Explaining,
    Exporter,
    MissingDependency,
    Readable,
    Runnable,
    Unsupported,
    UnsupportedByTarget,
)
from lightning_qat.export.verify import Agreement, verify

__all__ = [
    "export",
    "load_exporter",
    "verify",
    "Agreement",
    "Artifact",
    "Exporter",
    "Readable",
    "Runnable",
    "Explaining",
    "Unsupported",
    "UnsupportedByTarget",
    "CannotExpress",
    "MissingDependency",
]
