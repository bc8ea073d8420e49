"""Read what a pickle of ``torch.save`` would make, without making it.

``torch.load(weights_only=True)`` runs no code of a file, yet it calls what it allows with any
arguments: ``bytearray(2**40)`` takes a terabyte, a tensor of one number may claim a billion, and
tuples of tuples as a key take years to hash. So the instructions are followed here first, with
descriptions in the place of values.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

_DEEPEST = 100
"""Levels of nesting; a checkpoint has about ten."""
_SPARE = 2**28
"""Bytes that all tensors together may claim beyond what is stored, as expanded ones do."""
_LONGEST_SIZE = 2**48


class UnknownClass(ValueError):
    """A pickle refers to classes or functions that are none of torch's plain values.

    Args:
        names: Their dotted names.
    """

    def __init__(self, *names: str) -> None:
        super().__init__(f"it holds {', '.join(names)}: no tensor and no plain value")
        self.names = names


@dataclass(frozen=True)
class _Name:
    text: str
    depth: int = 0


@dataclass(frozen=True)
class _Tuple:
    items: tuple[Any, ...]
    depth: int


@dataclass(frozen=True)
class _Storage:
    elements: int
    itemsize: int
    depth: int = 0


@dataclass
class _Made:
    """A list, a dictionary, or what a call returned."""

    kind: str
    depth: int = 0
    inside_another: bool = False
    hashable_items: bool = True


_PLAIN_CALLS = {
    "torch.Size": "size",
    "torch.device": "value",
    "builtins.complex": "value",
    "torch.serialization._get_layout": "value",
    "torch._utils._rebuild_sparse_tensor": "tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensor",
    "torch._utils._rebuild_parameter": "tensor",
}
"""What may be called with arguments of any size, and the kind of its result."""
_FILLED = {
    "collections.OrderedDict": "dict",
    "collections.Counter": "dict",
    "builtins.set": "set",
}
"""Containers, whose items become keys."""
_STORED = {
    "torch._utils._rebuild_tensor": 0,
    "torch._utils._rebuild_tensor_v2": _SPARE,
    "torch._utils._rebuild_tensor_v3": _SPARE,
    "torch._utils._rebuild_qtensor": 0,
}
"""What makes a tensor of a storage, and the bytes it may claim beyond the storage's."""
_WITH_STATE = {
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_parameter_with_state",
}
_BYTES = ("_codecs.encode", "builtins.bytearray")
_RENAMED = {"__builtin__": "builtins"}


class AnyClass:
    """Every class is allowed, as by a reader that makes nothing of those it does not know."""

    def __contains__(self, name: object) -> bool:
        return True


def check_pickle(
    content: bytes, storages: Mapping[str, int], allowed: Container[str] = frozenset()
) -> None:
    """Refuse a pickle that holds more than tensors of its storages and plain values.

    Args:
        content: The pickle.
        storages: The size in bytes of each storage by its key.
        allowed: Dotted names of further classes that may be called with anything.

    Raises:
        UnknownClass: It holds something else; all of it by name.
        ValueError: It is damaged, or would take memory or time beyond its size.
    """
    try:
        steps = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(content)]
        names = dict.fromkeys(_dotted(text) for name, text in steps if name == "GLOBAL")
        unknown = [name for name in names if name not in _KNOWN and name not in allowed]
        if unknown:
            raise UnknownClass(*unknown)
        machine = _Machine(storages, allowed)
        for name, argument in steps:
            step = _STEPS.get(name)
            if step is None:
                raise ValueError(f"its pickle has the instruction {name}")
            step(machine, argument)
    except (IndexError, KeyError) as error:
        raise ValueError("its pickle is damaged: a value is used that is not there") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"its pickle is damaged: {error}") from error


class _Machine:
    def __init__(self, storages: Mapping[str, int], allowed: Container[str]) -> None:
        self._storages, self._allowed = storages, allowed
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._spare = _SPARE

    def push(self, value: Any) -> None:
        if _depth(value) > _DEEPEST:
            raise ValueError(f"its pickle is nested more than {_DEEPEST} levels deep")
        self._stack.append(value)

    def make(self, kind: str) -> None:
        self.push(_Made(kind))

    def mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def tuple_of(self, count: int | None) -> None:
        if count is None:
            items = self.since_mark()
        else:
            items = [self._stack.pop() for _ in range(count)][::-1]
        depth = 1 + max(map(_depth, items), default=0)
        for item in items:
            _enclose(item)
        self.push(_Tuple(tuple(items), depth))

    def append(self, items: list[Any]) -> None:
        self._fill("list", items)

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("its pickle is damaged: a key has no value")
        if not all(map(_is_key, items[::2])):
            raise ValueError("a key must be a text or a number, or a tuple of them")
        self._fill("dict", items)

    def _fill(self, kind: str, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, _Made) or target.kind not in (kind, "object"):
            raise ValueError(f"its pickle is damaged: it fills what is no {kind}")
        if target.inside_another:
            raise ValueError(f"its pickle fills a {kind} that another value holds already")
        for item in items:
            _enclose(item)
        if target.inside_another:
            raise ValueError(f"its pickle puts a {kind} into itself")
        target.hashable_items &= all(map(_is_key, items))
        target.depth = max([target.depth, *(1 + _depth(item) for item in items)])
        if target.depth > _DEEPEST:
            raise ValueError(f"its pickle is nested more than {_DEEPEST} levels deep")

    def pop(self, count: int) -> list[Any]:
        return [self._stack.pop() for _ in range(count)][::-1]

    def name(self, argument: str) -> None:
        self.push(_Name(_dotted(argument)))

    def storage(self) -> None:
        match self._stack.pop():
            case _Tuple(("storage", _Name(kind), str(key), str(), int(elements))):
                itemsize = _ITEMSIZES.get(kind, 0)
                if not itemsize or elements * itemsize != self._storages.get(key):
                    raise ValueError(
                        f"the storage {key!r} must be as large as its pickle says, "
                        f"{elements * itemsize} bytes; it has {self._storages.get(key, 'none')}"
                    )
                self.push(_Storage(elements, itemsize))
            case _:
                raise ValueError("its pickle is damaged: a tensor's data must be a storage")

    def call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, _Tuple):
            raise ValueError("its pickle is damaged: arguments must be a tuple")
        match function:
            case _Name(name):
                kind = self._result(name, arguments.items)
            case _Made("object"):
                kind = "object"
            case _:
                raise ValueError("its pickle is damaged: it calls what is no function")
        self.push(_Made(kind, arguments.depth))

    def _result(self, function: str, arguments: tuple[Any, ...]) -> str:
        """The kind of what a call returns; the arguments are looked at."""
        if function not in _KNOWN:
            return "object"
        if function in _PLAIN_CALLS:
            return _PLAIN_CALLS[function]
        if function in _FILLED:
            match arguments:
                case () | (_Made("dict"),) | (_Made("list", hashable_items=True),):
                    return _FILLED[function]
            raise ValueError("a key must be a text or a number, or a tuple of them")
        if function in _STORED:
            self._require_stored(function, arguments)
            return "tensor"
        if function in _BYTES:
            return _bytes_of(function, arguments)
        if function in _WITH_STATE:
            match arguments:
                case (_Name(inner), _Name(), _Tuple(inner_arguments), state):
                    _require_attributes(state)
                    return self._result(inner, inner_arguments)
                case (_Made("tensor"), _, _, state):
                    _require_attributes(state)
                    return "tensor"
        raise ValueError(f"its pickle calls {function}, which makes no plain value")

    def _require_stored(self, function: str, arguments: tuple[Any, ...]) -> None:
        match arguments:
            case (_Storage() as storage, int(offset), _Tuple() | _Made("size"), _Tuple(), *_):
                size = arguments[2].items if isinstance(arguments[2], _Tuple) else ()
                if offset < 0 or not all(type(n) is int and n >= 0 for n in size):
                    raise ValueError("its pickle is damaged: a tensor's size must be whole numbers")
                beyond = (prod(size) - storage.elements) * storage.itemsize
                spare = min(self._spare, _STORED[function])
                if prod(size) > _LONGEST_SIZE or beyond > spare:
                    raise ValueError(
                        f"a tensor of size {list(size)} claims more than is stored, "
                        f"{storage.elements} numbers"
                    )
                self._spare -= max(beyond, 0)
            case _:
                raise ValueError("its pickle is damaged: a tensor must have a storage and a size")

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, _Made) or target.kind not in ("dict", "object"):
            raise ValueError("its pickle sets attributes of what has none")
        _enclose(state)
        target.depth = max(target.depth, 1 + _depth(state))

    def new(self) -> None:
        arguments, cls = self._stack.pop(), self._stack.pop()
        if not isinstance(cls, _Name) or cls.text in _KNOWN:
            raise ValueError("its pickle makes an object of what is no class")
        self.push(_Made("object", _depth(arguments)))


def _dotted(argument: Any) -> str:
    module, _, name = str(argument).partition(" ")
    return f"{_RENAMED.get(module, module)}.{name}"


def is_known(module: str, name: str) -> bool:
    """Whether torch writes a class or function for tensors and plain values."""
    return f"{_RENAMED.get(module, module)}.{name}" in _KNOWN


def _depth(value: Any) -> int:
    return value.depth if isinstance(value, _Made | _Tuple) else 0


def _enclose(value: Any) -> None:
    """From now on another value holds it, so that it may not come to hold that one."""
    if isinstance(value, _Made):
        value.inside_another = True


def _is_key(key: Any) -> bool:
    """Whether a value is hashed at once: the hash of nested tuples takes exponential time."""
    items = key.items if isinstance(key, _Tuple) else (key,)
    return all(
        item is None
        or isinstance(item, str | int | float | _Name)
        or (isinstance(item, _Made) and item.kind == "object")
        for item in items
    )


def _require_attributes(state: Any) -> None:
    if not isinstance(state, _Made) or state.kind != "dict":
        raise ValueError("the attributes of a tensor must be a dictionary")


def _bytes_of(function: str, arguments: tuple[Any, ...]) -> str:
    match function, arguments:
        case ("_codecs.encode", (str(), "latin1")) | ("builtins.bytearray", ()):
            return "bytes"
        case ("builtins.bytearray", (_Made("bytes"),) | (str(), "latin1" | "latin-1")):
            return "bytes"
    raise ValueError(f"its pickle calls {function} with what is no text")


_ITEMSIZES = {
    "torch.storage.UntypedStorage": 1,
    **{
        f"torch.{name}Storage": size
        for size, names in {
            1: ("Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"),
            2: ("Half", "BFloat16", "Short"),
            4: ("Float", "Int", "QInt32"),
            8: ("Double", "Long", "ComplexFloat"),
            16: ("ComplexDouble",),
        }.items()
        for name in names
    },
}
"""Bytes per element of a storage by its class."""
_CONSTANTS = frozenset(
    str(value) for value in vars(torch).values() if isinstance(value, torch.dtype | torch.qscheme)
)
_KNOWN = frozenset(
    {
        *_PLAIN_CALLS,
        *_FILLED,
        *_STORED,
        *_WITH_STATE,
        *_BYTES,
        *_ITEMSIZES,
        *_CONSTANTS,
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
    }
)

_Step = Callable[[_Machine, Any], None]
_STEPS: Mapping[str, _Step] = {
    **dict.fromkeys(("PROTO", "STOP"), lambda machine, _: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
        _Machine.push,
    ),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.make("list"),
    "EMPTY_DICT": lambda machine, _: machine.make("dict"),
    "EMPTY_SET": lambda machine, _: machine.make("set"),
    "MARK": lambda machine, _: machine.mark(),
    "EMPTY_TUPLE": lambda machine, _: machine.tuple_of(0),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": lambda machine, _: machine.tuple_of(None),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "GLOBAL": _Machine.name,
    "BINPERSID": lambda machine, _: machine.storage(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "NEWOBJ": lambda machine, _: machine.new(),
}
