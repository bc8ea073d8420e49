"""Break what ``torch.save`` and ``torch.export.save`` write: the archive, its pickles, its JSON."""

import io
import json
import pickletools
import random
import zipfile

import torch

from reliability.fuzz.mutate_archive import mutate_archive
from reliability.fuzz.mutate_bytes import mutate_bytes
from reliability.fuzz.mutate_plain import ODD_VALUES, mutate_plain


def mutate_torch(content: bytes, generator: random.Random) -> bytes:
    """Return the file with parts, instructions, values or bytes changed."""
    choice = generator.randrange(20)
    if choice == 0:
        return mutate_bytes(content, generator)
    if choice < 8 and _is_saved(content):
        return _other_values(content, generator)
    return mutate_archive(content, generator, _mutate_member)


def _is_saved(content: bytes) -> bool:
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # it was broken before, or is an archive of another kind
        return False
    return True


def _other_values(content: bytes, generator: random.Random) -> bytes:
    """A whole file of ``torch.save`` that holds other values."""
    values = torch.load(io.BytesIO(content), weights_only=True)
    buffer = io.BytesIO()
    try:
        torch.save(mutate_plain(_as_plain(values), generator), buffer)
    except RecursionError:  # nothing pickles values that are nested so deep
        return mutate_bytes(content, generator)
    return buffer.getvalue()


def _as_plain(values: object) -> object:
    """Dictionaries and lists in the place of what is derived from them."""
    if isinstance(values, dict):
        return {key: _as_plain(value) for key, value in values.items()}
    return [_as_plain(value) for value in values] if isinstance(values, list) else values


def _mutate_member(name: str, data: bytes, generator: random.Random) -> bytes:
    if name.endswith(".json"):
        try:
            return json.dumps(_mutate_json(json.loads(data), generator)).encode()
        except (ValueError, RecursionError):  # broken before
            return mutate_bytes(data, generator)
    if name.endswith("data.pkl"):
        return _mutate_pickle(data, generator)
    if name.endswith("model.pt") and zipfile.is_zipfile(io.BytesIO(data)):
        return mutate_torch(data, generator)
    return mutate_bytes(data, generator)


def _mutate_json(tree: object, generator: random.Random) -> object:
    """Values of the tree, or of a text in it that is JSON itself, or an expression of sizes."""
    if generator.random() < 0.2:
        return _other_expressions(tree, generator)
    return mutate_plain(tree, generator)


def _other_expressions(tree: object, generator: random.Random) -> object:
    text = _expression(generator, generator.choice((1, 2, 3, 5)))
    if isinstance(tree, dict):
        return {
            key: text
            if key == "expr_str" and generator.random() < 0.3
            else _other_expressions(value, generator)
            for key, value in tree.items()
        }
    return (
        [_other_expressions(value, generator) for value in tree] if isinstance(tree, list) else tree
    )


def _expression(generator: random.Random, levels: int) -> str:
    """Arithmetic as torch.export writes it, more or less."""
    if levels == 0 or generator.random() < 0.1:
        numbers = ("Integer(2)", "Integer(-1)", "Integer(9223372036854775807)", "Float(0.5)")
        symbols = ("Symbol('s0', integer=True, positive=True)", "Symbol('s1')", "Symbol('u0')")
        return generator.choice(numbers + symbols)
    names = (
        *("Add", "Mul", "Pow", "Max", "Min", "Mod", "FloorDiv", "ModularIndexing", "CleanDiv"),
        *("Rational", "Where", "Eq", "Ne", "Lt", "And", "Or", "Not", "floor", "ceiling", "Abs"),
        *("PythonMod", "CeilToInt", "FloatTrueDiv", "IntTrueDiv", "ToFloat", "PowByNatural"),
        *("TruncToInt", "RoundToInt", "Identity", "LShift", "FloatPow", "open"),
    )
    count = generator.choice((1, 2, 2, 2, 3, 4))
    inside = ", ".join(_expression(generator, levels - 1) for _ in range(count))
    return f"{generator.choice(names)}({inside})"


def _mutate_pickle(data: bytes, generator: random.Random) -> bytes:
    """Instructions go, come twice, change places, or get another argument."""
    try:
        starts = [place for _, _, place in pickletools.genops(data) if place is not None]
    except ValueError:
        return mutate_bytes(data, generator)
    pieces = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(generator.choice((1, 1, 2, 4))):
        place = generator.randrange(len(pieces))
        choice = generator.randrange(6)
        if choice == 0:
            del pieces[place]
        elif choice == 1:
            pieces.insert(place, generator.choice(pieces))
        elif choice == 2:
            other = generator.randrange(len(pieces))
            pieces[place], pieces[other] = pieces[other], pieces[place]
        elif choice == 3:
            pieces[place] = mutate_bytes(pieces[place], generator)
        elif choice == 4:
            pieces.insert(place, generator.choice(_INSTRUCTIONS))
        else:
            pieces[place] = _number(generator)
        if not pieces:
            break
    return b"".join(pieces)


_INSTRUCTIONS = (
    *(b"}", b"]", b")", b"(", b"N", b"\x88", b"\x85", b"\x86", b"\x87", b"t", b"R", b"b", b"Q"),
    *(b"a", b"e", b"s", b"u", b"0", b"2", b"h\x00", b"q\x00", b"r\xff\xff\xff\x7f"),
    b"cbuiltins\nbytearray\n",
    b"ctorch.storage\nUntypedStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch\nSize\n",
    b"ctorch\nFloatTensor\n",
    b"ccollections\nOrderedDict\n",
    b"cos\nsystem\n",
    b"X\x04\x00\x00\x00true",
)


def _number(generator: random.Random) -> bytes:
    value = generator.choice([v for v in ODD_VALUES if type(v) is int and abs(v) < 2**500])
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
