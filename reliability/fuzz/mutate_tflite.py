"""Break a TFLite file: its bytes, or the fields of its tables."""

import random
from typing import Any

import numpy as np

from lightning_qat_exporters.tflite.flatbuffer.file import pack, unpack
from reliability.fuzz.mutate_bytes import mutate_bytes

_NUMBERS = (-(2**31), -2, -1, 0, 1, 2, 5, 127, 128, 255, 2**16, 2**31 - 1)


def mutate_tflite(content: bytes, generator: random.Random) -> bytes:
    """Return the file with bytes, or fields of tables, changed."""
    if generator.random() < 0.5:
        return mutate_bytes(content, generator)
    model = unpack(content)
    for _ in range(generator.choice((1, 1, 2, 3))):
        holder, field = generator.choice(_fields(model))
        setattr(holder, field, _other(getattr(holder, field), generator))
    try:
        return pack(model)
    except Exception:  # the format cannot say it
        return mutate_bytes(content, generator)


def _fields(model: Any) -> list[tuple[Any, str]]:
    """Every field of every table."""
    found, waiting = [], [model]
    while waiting:
        table = waiting.pop()
        for field, value in vars(table).items():
            found.append((table, field))
            values = value if isinstance(value, list) else [value]
            waiting += [item for item in values if hasattr(item, "Pack")]
    return found


def _other(value: Any, generator: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return generator.choice((*_NUMBERS, value + 1, value - 1))
    if isinstance(value, float):
        return generator.choice((0.0, -1.0, 1e-45, 3e38, float("nan"), float("inf")))
    if isinstance(value, bytes):
        return generator.choice((b"", b"x", b"\xff", value + value))
    if isinstance(value, list | np.ndarray) and len(value):
        items = list(value)
        place = generator.randrange(len(items))
        if generator.random() < 0.4:
            del items[place]
        elif generator.random() < 0.5:
            items.insert(place, generator.choice(items))
        elif not hasattr(items[place], "Pack"):
            items[place] = generator.choice(_NUMBERS)
        if isinstance(value, np.ndarray):
            return np.asarray(items, np.float64).astype(value.dtype)
        return items
    return None
