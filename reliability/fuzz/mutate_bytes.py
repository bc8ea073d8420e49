"""Break a file without knowing its format."""

import random
import struct

NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)
"""Where sizes, signs and counts overflow."""


def mutate_bytes(content: bytes, generator: random.Random) -> bytes:
    """Change, cut, repeat or insert bytes at one to four places.

    >>> mutate_bytes(b"abcdef", random.Random(0)) == mutate_bytes(b"abcdef", random.Random(0))
    True
    """
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        generator.choice((_flip, _overwrite, _number, _delete, _repeat, _insert, _cut))(
            data, generator
        )
    return bytes(data)


def _place(data: bytearray, generator: random.Random) -> int:
    return generator.randrange(len(data) + 1)


def _flip(data: bytearray, generator: random.Random) -> None:
    if data:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def _overwrite(data: bytearray, generator: random.Random) -> None:
    start = _place(data, generator)
    size = min(generator.choice((1, 2, 4, 16)), len(data) - start)
    data[start : start + size] = generator.randbytes(size)


def _number(data: bytearray, generator: random.Random) -> None:
    start = _place(data, generator)
    form = generator.choice("BHIQ")
    packed = struct.pack(
        generator.choice("<>") + form,
        generator.choice(NUMBERS) & ((1 << 8 * struct.calcsize(form)) - 1),
    )
    data[start : start + len(packed)] = packed


def _delete(data: bytearray, generator: random.Random) -> None:
    start = _place(data, generator)
    del data[start : start + generator.choice((1, 2, 8, 64, 1024))]


def _repeat(data: bytearray, generator: random.Random) -> None:
    start = _place(data, generator)
    piece = data[start : start + generator.choice((1, 4, 32, 256))]
    data[start:start] = piece * generator.choice((1, 2, 16))


def _insert(data: bytearray, generator: random.Random) -> None:
    start = _place(data, generator)
    data[start:start] = generator.randbytes(generator.choice((1, 4, 32)))


def _cut(data: bytearray, generator: random.Random) -> None:
    del data[_place(data, generator) :]
