"""Break a tree of dicts, lists and plain values: JSON, YAML, what a checkpoint holds."""

import copy
import random
from typing import Any


def nested(depth: int) -> list[Any]:
    """Return lists in lists.

    >>> nested(3)
    [[[]]]
    """
    tree: list[Any] = []
    for _ in range(depth - 1):
        tree = [tree]
    return tree


ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.0,
    -0.0,
    0.5,
    1e-45,
    1e-320,
    3.5e38,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    " ",
    "0",
    "1e-3",
    "true",
    "null",
    "*",
    "[",
    "\x00",
    "é☃\U0001f600",
    "../../x",
    "a.b.c",
    "x" * 10_000,
    [],
    {},
    [None],
    [0, "a"],
    {"a": 1},
    {"": None},
    [[1, 2], [3]],
)
"""Values that a reader may not expect where they stand."""


def mutate_plain(tree: Any, generator: random.Random) -> Any:
    """Return a copy of the tree that differs at one to four places.

    >>> tree = {"a": [1, 2], "b": "c"}
    >>> mutate_plain(tree, random.Random(1)) != tree
    True
    >>> tree
    {'a': [1, 2], 'b': 'c'}
    """
    root = [copy.deepcopy(tree)]  # in a list, so that the root has a place too
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        holder, key = generator.choice(_places(root))
        _change(root, holder, key, generator)
    return root[0] if root else None


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Return every (container, key) of the tree."""
    places: list[tuple[Any, Any]] = []
    todo: list[Any] = [root]
    while todo:
        holder = todo.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                todo.append(holder[key])
    return places


def _change(root: list[Any], holder: Any, key: Any, generator: random.Random) -> None:
    value = holder[key]
    choice = generator.randrange(8)
    if choice == 0 and holder is not root:
        del holder[key]
    elif choice == 1:  # the value of another place
        other, other_key = generator.choice(_places(root))
        holder[key] = copy.deepcopy(other[other_key])
    elif choice == 2 and isinstance(holder, dict):  # another key
        name = generator.choice((key, f"{key}x", generator.choice(ODD_VALUES)))
        name = name if isinstance(name, (str, int, float, bool, type(None))) else str(name)
        holder[name] = holder.pop(key)
    elif choice == 3 and isinstance(holder, list) and holder is not root:
        holder.insert(key, copy.deepcopy(value))
    elif choice == 4:
        holder[key] = generator.choice(([value], {"a": value}, str(value)[:1000]))
    elif choice == 5 and isinstance(value, (int, float)) and not isinstance(value, bool):
        small = isinstance(value, float) or abs(value) < 2**64  # a float takes no larger int
        scaled = (value * 1e-3, value * 1e6, str(value)) if small else (value // 3,)
        holder[key] = generator.choice((-value, value + 1, *scaled))
    elif choice == 6 and isinstance(value, str):
        place = generator.randrange(len(value) + 1)
        holder[key] = generator.choice(
            (
                value[:place],
                value[:place] + generator.choice("\n:*[0 ") + value[place:],
                value.upper(),
            )
        )
    elif choice == 7 and generator.random() < 0.1:
        holder[key] = nested(generator.choice((50, 500)))
    else:
        holder[key] = copy.deepcopy(generator.choice(ODD_VALUES))
