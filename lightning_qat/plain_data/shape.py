"""What plain data must look like, said as a type: ``TypedDict``, ``list``, ``tuple``, ``|``."""

from __future__ import annotations

import reprlib
import types
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from typing_extensions import is_typeddict

_MOST_TOLD = 20

ShapeT = TypeVar("ShapeT")


def as_shape(value: object, shape: type[ShapeT], what: str) -> ShapeT:
    """The value itself, once it has the shape.

    Args:
        value: Mappings, lists, texts, numbers, flags and ``None``.
        shape: ``str``, ``int``, ``float`` (also an int), ``bool``, ``None``, ``object`` (anything),
            ``list[X]``, ``dict[str, X]``, ``tuple[X, Y]`` (a list of so many), ``X | Y``,
            ``Literal`` or a ``TypedDict``. Further keys of a mapping are let be.
        what: What the value is, for the message.

    Raises:
        ValueError: It has another shape; each place is named, with what must hold there.

    Example:
        >>> as_shape({"bits": "8"}, dict[str, int], "the sizes")
        Traceback (most recent call last):
        ...
        ValueError: the sizes must have the shape that was written: ['bits'] must be int; got '8'.
    """
    told = [*islice(shape_problems(value, shape), _MOST_TOLD)]
    if told:
        raise ValueError(f"{what} must have the shape that was written: {'; '.join(told)}.")
    return cast(ShapeT, value)


def shape_problems(value: object, shape: Any, where: str = "") -> Iterator[str]:
    """A message for each place where a value has another shape.

    Args:
        value: As for ``as_shape``.
        shape: As for ``as_shape``.
        where: The place of the value, as ``['rows'][3]``.
    """
    origin, parts = get_origin(shape), get_args(shape)
    if is_typeddict(shape):
        yield from _mapping_problems(value, shape, where)
    elif origin in (Union, types.UnionType):
        inner = [[*islice(shape_problems(value, part, where), _MOST_TOLD)] for part in parts]
        if all(inner):
            # Of several alternatives that of the same kind says most.
            deeper = [told for told in inner if not told[0].startswith(f"{where or 'it'} must be")]
            yield from deeper[0] if deeper else [_wrong(value, shape, where)]
    elif origin is list:
        if not isinstance(value, list):
            yield _wrong(value, shape, where)
            return
        for number, item in enumerate(value):
            yield from shape_problems(item, parts[0], f"{where}[{number}]")
    elif origin is tuple:
        if not isinstance(value, list) or len(value) != len(parts):
            yield _wrong(value, shape, where)
            return
        for number, (item, part) in enumerate(zip(value, parts, strict=True)):
            yield from shape_problems(item, part, f"{where}[{number}]")
    elif origin is dict:
        if not isinstance(value, Mapping):
            yield _wrong(value, shape, where)
            return
        for key, item in value.items():
            yield from shape_problems(item, parts[1], f"{where}[{_short(key)}]")
    elif not _is_scalar(value, shape):
        yield _wrong(value, shape, where)


def _mapping_problems(value: object, shape: Any, where: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield _wrong(value, dict, where)
        return
    for key, inner in _hints(shape).items():
        if key in value:
            yield from shape_problems(value[key], inner, f"{where}[{key!r}]")
        elif key in shape.__required_keys__:
            yield f"{where or 'it'} must have the key {key!r}"


def _is_scalar(value: object, shape: Any) -> bool:
    if get_origin(shape) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(shape))
    if shape in (object, Any):
        return True
    if shape in (None, type(None)):
        return value is None
    if shape in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float) if shape is float else isinstance(value, shape)


def _wrong(value: object, shape: Any, where: str) -> str:
    return f"{where or 'it'} must be {_name(shape)}; got {_short(value)}"


def _name(shape: Any) -> str:
    if get_origin(shape) in (Union, types.UnionType):
        return " or ".join(_name(part) for part in get_args(shape))
    if shape in (None, type(None)):
        return "null"
    if get_origin(shape) is Literal:
        return " or ".join(map(repr, get_args(shape)))
    if get_origin(shape) is tuple:
        return f"a list of {len(get_args(shape))}"
    kind = get_origin(shape) or shape
    if is_typeddict(shape) or kind is dict:
        return "a mapping"
    return _WORDS.get(kind) or str(kind.__name__)


_WORDS = {list: "a list", str: "a text", bool: "true or false"}
_REPR = reprlib.Repr()
_REPR.maxstring = 60


def _short(value: object) -> str:
    return _REPR.repr(value)


@lru_cache
def _hints(shape: Any) -> dict[str, Any]:
    return get_type_hints(shape)
