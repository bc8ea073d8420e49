"""YAML as plain data: every key once, no tags, aliases counted where they stand, by line.

The events of PyYAML's parser are put together here and not by its composer and its constructor:
these call themselves for each level, expand no limit, and let the last of two keys win.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

import yaml

from lightning_qat.plain_data.limits import (
    MOST_CHARACTERS,
    MOST_LEVELS,
    MOST_VALUES,
    integer_problem,
    levels_problem,
)

_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str")}
_COLLECTIONS = {None, "!", f"{_TAG}map", f"{_TAG}seq"}
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Scalars(yaml.SafeLoader):
    """What a plain scalar stands for; only its resolver and its constructor are used."""


# 1e-3 is a number, as in YAML 1.2, JSON and LightningCLI; PyYAML wants a point in it.
_Scalars.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_SCALARS: Any = _Scalars("")


def parse_yaml(text: str, *, names_only: bool = True) -> object:
    """Read YAML.

    Args:
        text: One document. Anchors, aliases and merges (``<<``) are followed; dates are texts.
        names_only: Keys must be texts; otherwise they may be any plain value.

    Returns:
        Mappings, lists, texts, numbers, flags and ``None``.

    Raises:
        ValueError: It is no YAML, has a tag, a key twice in a mapping, or goes beyond the limits;
            the message has the line.

    Example:
        >>> parse_yaml("weight: {bits: 4}")
        {'weight': {'bits': 4}}
    """
    built = _Document(names_only)
    try:
        for event in yaml.parse(text, Loader=_PARSER):
            built.take(event)
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {error}") from error
    return built.value


class _Open:
    """A list or mapping whose end has not come yet."""

    def __init__(self, event: Any) -> None:
        self.anchor: str | None = event.anchor
        self.values: list[Any] | dict[Any, Any] = {}
        if isinstance(event, yaml.SequenceStartEvent):
            self.values = []
        self.merged: list[Mapping[Any, Any]] = []
        self.has_key = False
        self.key: Any = None
        # Of all that is inside: levels, values, characters.
        self.size = [1, 1, 0]


class _Document:
    """The value of a document, made event by event."""

    def __init__(self, names_only: bool) -> None:
        self.value: object = None
        self._names_only = names_only
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, list[int]]] = {}
        self._unfinished: set[str] = set()
        self._documents = 0

    def take(self, event: Any) -> None:
        """Go on with the next event of the parser."""
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                _refuse(event, "a file must hold one document; a second one begins")
        elif isinstance(event, yaml.ScalarEvent):
            value, is_merge = self._scalar(event)
            size = [0, 1, len(event.value)]
            if event.anchor is not None:
                self._anchors[event.anchor] = value, size
            self._add(event, value, size, is_merge=is_merge)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in self._unfinished:
                _refuse(event, f"a value must not hold itself; *{event.anchor} does")
            if event.anchor not in self._anchors:
                _refuse(event, f"an alias must have an anchor before it; *{event.anchor} has none")
            self._add(event, *self._anchors[event.anchor])
        elif isinstance(event, yaml.CollectionStartEvent):
            if event.tag not in _COLLECTIONS:
                _refuse_tag(event)
            if self._open and self._is_at_key(self._open[-1]):
                _refuse(event, "a key must be a text; one is a list or a mapping")
            if len(self._open) >= MOST_LEVELS:
                _refuse(event, levels_problem())
            self._open.append(_Open(event))
            if event.anchor is not None:
                self._unfinished.add(event.anchor)
                self._anchors.pop(event.anchor, None)
        elif isinstance(event, yaml.CollectionEndEvent):
            done = self._open.pop()
            own = done.values
            if isinstance(own, dict):
                for merged in done.merged:
                    own = {**merged, **own}
                done.values = own
            if done.anchor is not None:
                self._unfinished.discard(done.anchor)
                self._anchors[done.anchor] = done.values, done.size
            self._add(event, done.values, done.size)

    def _is_at_key(self, frame: _Open) -> bool:
        return isinstance(frame.values, dict) and not frame.has_key

    def _add(self, event: Any, value: Any, size: list[int], *, is_merge: bool = False) -> None:
        if not self._open:
            self.value = value
            return
        frame = self._open[-1]
        self._count(event, frame, size)
        if isinstance(frame.values, list):
            frame.values.append(value)
        elif not frame.has_key:
            frame.has_key, frame.key = True, _MERGE if is_merge else self._key(event, value)
            if frame.key in frame.values:
                _refuse(event, f"a key must come once in its mapping; {value!r} comes again")
        else:
            frame.has_key = False
            if frame.key is _MERGE:
                frame.merged += _mappings(event, value)
            else:
                frame.values[frame.key] = value

    def _count(self, event: Any, frame: _Open, size: list[int]) -> None:
        frame.size[0] = max(frame.size[0], 1 + size[0])
        frame.size[1] += size[1]
        frame.size[2] += size[2]
        if len(self._open) - 1 + frame.size[0] > MOST_LEVELS:
            _refuse(event, levels_problem())
        if frame.size[1] > MOST_VALUES:
            _refuse(event, f"data must have at most {MOST_VALUES:,} values; they have more")
        if frame.size[2] > MOST_CHARACTERS:
            _refuse(event, f"texts must have {MOST_CHARACTERS:,} characters at most together")

    def _key(self, event: Any, value: Any) -> Any:
        if isinstance(value, dict | list):
            _refuse(event, "a key must be a text; one is a list or a mapping")
        if self._names_only and not isinstance(value, str):
            written = getattr(event, "value", value)
            _refuse(event, f"a key must be a text; got {value!r}. Write it in quotes: '{written}'")
        return value

    def _scalar(self, event: Any) -> tuple[Any, bool]:
        """Its value, and whether it is the key of a merge."""
        if event.tag in (None, "!"):
            tag = _SCALARS.resolve(yaml.ScalarNode, event.value, event.implicit)
        else:
            tag = event.tag
            if tag not in _PLAIN:
                _refuse_tag(event)
        if tag == f"{_TAG}merge":
            return event.value, bool(self._open) and self._is_at_key(self._open[-1])
        if tag not in _PLAIN:
            return event.value, False  # a date
        try:
            value = _SCALARS.construct_object(yaml.ScalarNode(tag, event.value))
        except (ValueError, LookupError) as error:
            raise ValueError(
                f"line {_line(event)}: {_shortened(event.value)} is no {tag.removeprefix(_TAG)}"
            ) from error
        problem = integer_problem(value) if isinstance(value, int) else None
        if problem is not None:
            _refuse(event, problem)
        return value, False


_MERGE = object()


def _mappings(event: Any, value: Any) -> list[Mapping[Any, Any]]:
    """What a merge takes; of several the first wins."""
    several = value if isinstance(value, list) else [value]
    if not all(isinstance(one, dict) for one in several):
        _refuse(event, "<< must be a mapping or a list of mappings")
    return several


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _refuse(event: Any, problem: str) -> NoReturn:
    raise ValueError(f"line {_line(event)}: {problem}")


def _refuse_tag(event: Any) -> NoReturn:
    _refuse(
        event,
        f"a value must be plain, without a tag; one has {_shortened(event.tag)}. Tags make "
        "objects, which are never made from a file",
    )
