"""Run an ONNX file on arrays of a user, and say in plain words what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.onnx_files.run import OnnxSession

_DTYPES = {"float": "float32", "double": "float64", "string": "object"}
"""ONNX Runtime's names of types, where NumPy has other ones."""


def checked_run(
    path: Path, open_session: Callable[[], OnnxSession], inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """Open a session and run it; outputs by name.

    Args:
        path: The file, for messages.
        open_session: Opens it.
        inputs: Arrays by input name.

    Raises:
        ValueError: ONNX Runtime refuses the file or fails on the inputs, or names, types or shapes
            are not those of the file; everything that does not fit is named.
        OSError: The file cannot be read.
    """
    try:
        session = open_session()
        problems = [*input_problems(session.inputs, inputs)]
        if problems:
            lines = "".join(f"\n  {problem}" for problem in problems)
            raise ValueError(f"The inputs must be those of {str(path)!r}:{lines}")
        return session.run(inputs)
    except (ValueError, OSError):
        raise
    except Exception as error:  # ONNX Runtime's have no base class of their own
        raise ValueError(f"ONNX Runtime cannot run {str(path)!r}: {error}") from error


def input_problems(
    wanted: Mapping[str, tuple[str, Sequence[int | str | None] | None]], given: Mapping[str, Array]
) -> Iterator[str]:
    """What is missing, unknown or of another type or shape.

    Args:
        wanted: Type in ONNX Runtime's words, and shape, by name; ``None``: any shape.
        given: The arrays.
    """
    for name, (type_, shape) in wanted.items():
        if not type_.startswith("tensor("):
            yield f"{name!r} is a {type_}, which is no array; only the Python API takes it"
            continue
        dtype = type_[len("tensor(") : -1]
        dtype = _DTYPES.get(dtype, dtype)
        must = f"{name!r} must be {dtype}"
        if shape is not None:
            sizes = ", ".join("?" if size is None else str(size) for size in shape)
            must = f"{must} [{sizes}]"
        if name not in given:
            yield f"{must}; it is missing"
            continue
        array = given[name]
        got = f"{array.dtype} {list(array.shape)}"
        if array.dtype != np.dtype(dtype):
            yield f"{must}; got {got}: array.astype('{dtype}') changes the type"
        elif shape is not None and not _fits(array.shape, shape):
            yield f"{must}; got {got}"
    for name in sorted(given.keys() - wanted.keys()):
        yield f"{name!r} is not an input of the model"


def _fits(got: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    pairs = zip(got, wanted, strict=False)
    return len(got) == len(wanted) and all(not isinstance(w, int) or g == w for g, w in pairs)
