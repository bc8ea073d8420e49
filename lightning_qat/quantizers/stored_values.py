"""Plain values as a tensor: whoever loops over a state_dict takes every value for a tensor.

Averages of weights call ``.dtype``, ``.numel()``, ``.clone()`` and ``.copy_()`` on each.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SUM = "crc32"


def to_tensor(values: Mapping[str, Any]) -> Tensor:
    """JSON of plain values, with its checksum under ``crc32``, as uint8 of shape ``(bytes,)``.

    Example:
        >>> bytes(to_tensor({"bits": 8}).tolist()).decode()
        '{"bits":8,"crc32":4192825741}'
    """
    text = _json(values)
    text = _json({**values, _SUM: zlib.crc32(text.encode())})
    return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)


def from_tensor(stored: Tensor | Mapping[str, Any], key: str) -> dict[str, Any]:
    """Read what ``to_tensor`` gave; tuples have become lists.

    Args:
        stored: The tensor, of any dtype that holds the numbers 0 to 255, or the values themselves,
            as earlier versions stored them.
        key: Where it stands, for the message.

    Raises:
        ValueError: The tensor was changed.
    """
    if not isinstance(stored, Tensor):
        return dict(stored)
    numbers = stored.detach().cpu()
    values: Any = None
    try:
        # An average in floating point has rounding errors.
        numbers = numbers.round() if numbers.is_floating_point() else numbers
        values = json.loads(bytes(numbers.to(torch.int64).tolist()))
        expected = values.pop(_SUM)
        intact = bool(zlib.crc32(_json(values).encode()) == expected)
    except (ValueError, LookupError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise ValueError(
            f"{key!r} of a state_dict must hold its text (JSON as bytes) as it was saved; it was "
            "changed. Averages of weights must leave tensors that are not floating point as they "
            "are, or copy them from the model."
        )
    return dict(values)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":"))
