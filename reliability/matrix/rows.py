"""The versions that are tried, here and in CI; needs the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass

from reliability.matrix.parts import EVERYTHING

PYTHON = "3.11"
"""Of the development pins."""


@dataclass(frozen=True)
class Row:
    """Versions that are installed together.

    Args:
        name: Unique.
        pins: Requirements of ``pip``. All other packages are those of ``constraints.txt``.
        python: The interpreter.
        parts: What is tested; names of ``parts.PARTS``.
        extras: Extras of the project to install.
        constrained: ``False``: packages without a pin are the newest that fit.
        whole: CI runs all tests, not only the parts.
    """

    name: str
    pins: tuple[str, ...] = ()
    python: str = PYTHON
    parts: tuple[str, ...] = EVERYTHING
    extras: tuple[str, ...] = ("cli",)
    constrained: bool = True
    whole: bool = False


_LIGHTNING = ("core", "training", "checkpoint", "cli")
_FILES = ("core", "convert", "onnx", "cann", "cli")

# The lower bounds of pyproject.toml; change both together.
_OLD_LIBRARIES = (
    *("lightning==2.5.0", "numpy==1.26.4", "onnx==1.17.0", "onnx-ir==0.1.16"),
    *("onnxruntime==1.22.0", "onnxscript==0.6.2", "PyYAML==6.0.1", "jsonargparse==4.50.0"),
)
_OLDEST = (*_OLD_LIBRARIES, "protobuf==4.25.0", "click==8.2.0", "rich==13.7.0", "Jinja2==3.1.0")


def _files(onnx: str, onnxruntime: str) -> Row:
    pins = (f"onnx=={onnx}", f"onnxruntime=={onnxruntime}")
    return Row(f"onnx {onnx}, onnxruntime {onnxruntime}", pins, parts=_FILES)


ROWS = (
    Row("pins", extras=("cli", "tflite"), parts=(*EVERYTHING, "tflite"), whole=True),
    Row("oldest", ("torch==2.10.0", *_OLD_LIBRARIES), python="3.10", whole=True),
    Row("newest", python="3.14", constrained=False, whole=True),
    Row("oldest but for torch", _OLDEST),
    Row("newest but for torch", ("torch==2.13.0",), constrained=False),
    *(
        Row(f"lightning {version}", (f"lightning=={version}",), parts=_LIGHTNING)
        for version in ("2.5.0", "2.5.3", "2.5.6", "2.6.0", "2.6.4")
    ),
    _files("1.17.0", "1.22.0"),
    _files("1.18.0", "1.23.2"),
    _files("1.19.1", "1.24.4"),
    _files("1.20.1", "1.26.0"),
    _files("1.21.0", "1.28.0"),
    _files("1.22.0", "1.30.0"),
    _files("1.23.2", "1.32.0"),
    _files("1.17.0", "1.32.0"),
    _files("1.23.2", "1.22.0"),
    *(
        Row(f"torch {version}", (f"torch=={version}",))
        for version in ("2.10.0", "2.12.1", "2.14.1")
    ),
    *(Row(f"Python {version}", python=version) for version in ("3.10", "3.12", "3.13", "3.14")),
    Row("numpy 1.26.4", ("numpy==1.26.4",), parts=_FILES),
)
"""Every row has a name of its own, and differs from the development pins in what it names."""
