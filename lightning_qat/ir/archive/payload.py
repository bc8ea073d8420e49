"""Weights and constants of a ``.pt2`` file: plain numbers, as many as are stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from lightning_qat.torch_files.parts import Part

_TENSOR = re.compile(r"(weight|tensor)_\d+")
_SPARE = 2**24
"""Numbers that all tensors together may claim beyond what is stored, as expanded ones do."""


def check_payload(config: Any, name: str, found: Mapping[str, Part]) -> None:
    """Refuse weights that are pickled, missing, or larger than what is stored of them.

    Args:
        config: The table of tensors.
        name: The name of its part, for the message.
        found: The parts of the archive.

    Raises:
        ValueError: A tensor is refused, or the table is none; the message names it.
    """
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise ValueError(f"{name} must hold a table of tensors")
    folder = name.rpartition("/")[0]
    spare = _SPARE
    for key, entry in entries.items():
        where = f"{name}: {key!r}"
        if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
            raise ValueError(f"{where} must be plain numbers; it is a pickle")
        path = entry.get("path_name")
        if not isinstance(path, str) or not _TENSOR.fullmatch(path):
            raise ValueError(f"{where} must be a tensor; it is {path!r}")
        stored = found.get(f"{folder}/{path}")
        if stored is None:
            raise ValueError(f"{where} must have its numbers in {folder}/{path}; there is none")
        claimed = prod(_sizes(entry.get("tensor_meta"), where))
        spare -= max(claimed - stored.size, 0)
        if spare < 0 or (claimed and not stored.size):
            raise ValueError(
                f"{where} claims {claimed} numbers; {stored.size} bytes are stored of it"
            )


def _sizes(meta: Any, where: str) -> list[int]:
    """The size of a tensor; its strides and offset are looked at too."""
    if not isinstance(meta, dict):
        raise ValueError(f"{where} must say its size")
    offset = [meta.get("storage_offset", {"as_int": 0})]
    lists = [meta.get("sizes"), meta.get("strides"), offset]
    numbers = [
        [item.get("as_int") if isinstance(item, dict) else None for item in values]
        for values in lists
        if isinstance(values, list)
    ]
    flat = [number for values in numbers for number in values]
    if len(numbers) < len(lists) or not all(type(n) is int and 0 <= n < 2**48 for n in flat):
        raise ValueError(f"{where} must have sizes, strides and an offset that are whole numbers")
    if len(numbers[0]) != len(numbers[1]) or len(numbers[0]) > 64:
        raise ValueError(f"{where} must have as many strides as sizes, at most 64")
    return [number for number in numbers[0] if isinstance(number, int)]
