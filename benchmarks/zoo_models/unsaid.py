"""Which float products of a file neither the report nor the export tells of."""

from __future__ import annotations

import re
from collections.abc import Sequence

_COUNTED = (
    re.compile(r"^(?:matmul|linear|conv\w*|einsum): (\d+) planned on integers", re.MULTILINE),
    re.compile(r"\b(\d+) (?:BATCH_MATMUL|FULLY_CONNECTED)\b"),
)
_CALL_NUMBER = re.compile(r"_\d+$")


def unsaid(floats: Sequence[str], said: str) -> list[str]:
    """The float products that no sentence names.

    Args:
        floats: Their names in the file: ``layers.0.attention/MatMul`` in ONNX files,
            ``FULLY_CONNECTED layers.0.fc_1`` in TFLite files, where a product of two activations
            has a number of the converter's only.
        said: Report and notes, a sentence per line.

    Returns:
        Those whose module is not in the text, less those that the text counts without a name for
        each: ``matmul: 2 planned on integers, computed in float``.

    Example:
        >>> unsaid(["BATCH_MATMUL net;57", "CONV_2D a.b"], "matmul: 1 planned on integers, ...")
        ['CONV_2D a.b']
    """
    without = [name for name in floats if not _is_named(name, said)]
    counted = max(sum(map(int, pattern.findall(said))) for pattern in _COUNTED)
    unnamed = [name for name in without if _is_anonymous(name)]
    return [name for name in without if name not in unnamed[:counted]]


def _is_named(name: str, said: str) -> bool:
    module = name.rpartition(" ")[2].partition("/")[0]
    return f"'{name}'" in said or any(
        re.search(rf"(?<![\w.]){re.escape(path)}(?![\w.]*\w)", said)
        for path in {module, _CALL_NUMBER.sub("", module)} - {""}
    )


def _is_anonymous(name: str) -> bool:
    return name.startswith("BATCH_MATMUL ") or ";" in name
