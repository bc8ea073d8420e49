"""The calls in a function's code, numbered by what they call: independent of lines and layout."""

from __future__ import annotations

import dis
from collections import Counter
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple

Place = tuple[str, Any]
"""Name of an opcode, and where it stands in the file: lines and columns."""


class CodeSites(NamedTuple):
    """The places in a function from which something can be called.

    A place is named by what is called there and by a number: ``cat#1`` is the second place that
    calls something named ``cat``, ``+#0`` the first sum. Comments, blank lines, line breaks and
    other calls in between change no name.

    Args:
        by_offset: Offset of an instruction in the bytecode to its name.
        by_place: Opcode and position of an instruction to its name.
        counts: What is called to the number of places that call it.
    """

    by_offset: Mapping[int, str]
    by_place: Mapping[Place, str]
    counts: Mapping[str, int]


def code_sites(code: CodeType) -> CodeSites:
    """The places in a function.

    Python 3.10 does not tell in which columns an instruction stands: all calls are named ``call``.

    Example:
        >>> def forward(x, y):
        ...     return (x + y).add(y + y)
        >>> sites = code_sites(forward.__code__)
        >>> sites.counts["+"], sorted({name for name in sites.by_offset.values() if "+" in name})
        (2, ['+#0', '+#1'])
    """
    # By identity: the hash of a code object is that of its whole bytecode.
    known = _KNOWN.get(id(code))
    if known is None or known[0] is not code:
        known = _KNOWN[id(code)] = code, _code_sites(code)
    return known[1]


_KNOWN: dict[int, tuple[CodeType, CodeSites]] = {}


def _code_sites(code: CodeType) -> CodeSites:
    instructions = list(dis.get_instructions(code))
    counts: Counter[str] = Counter()
    by_offset: dict[int, str] = {}
    by_place: dict[Place, str] = {}
    for number, instruction in enumerate(instructions):
        place = place_of(instruction)
        # The compiler repeats code: the test of a loop, a finally block.
        site = None if place is None else by_place.get(place)
        if site is None:
            called = _called(instructions, number)
            site = f"{called}#{counts[called]}"
            counts[called] += 1
        # While a Python function runs its caller stands behind the call, in what the interpreter
        # keeps there for itself.
        following = instructions[number + 1 : number + 2]
        end = following[0].offset if following else instruction.offset + 1
        by_offset |= dict.fromkeys(range(instruction.offset, end), site)
        if place is not None:
            by_place[place] = site
    return CodeSites(by_offset, by_place, counts)


def place_of(instruction: Any) -> Place | None:
    """Where an instruction of ``dis`` or dynamo stands in the file; ``None``: it is not known."""
    positions = getattr(instruction, "positions", None)
    if positions is None or positions.col_offset is None:
        return None
    return instruction.opname, tuple(positions)


def _called(instructions: Sequence[dis.Instruction], number: int) -> str:
    """What an instruction calls: the name of a function, the sign of an operator, its opcode."""
    call = instructions[number]
    if call.opname == "BINARY_OP":
        return call.argrepr
    if not call.opname.startswith("CALL"):
        return call.opname.lower()
    place = place_of(call)
    if place is None:
        return "call"
    # The expression of what is called begins where the call begins, and is the longest of these.
    line, _, column, _ = place[1]
    best, end = None, (0, 0)
    for index, earlier in enumerate(instructions[:number]):
        found = place_of(earlier)
        if found is None or not found[0].startswith("LOAD_") or found[0] == "LOAD_CONST":
            continue
        first_line, last_line, first_column, last_column = found[1]
        if (first_line, first_column) == (line, column) and (last_line, last_column) > end:
            best, end = index, (last_line, last_column)
    if best is None:
        return "call"
    # On lines of its own an attribute has a position of its own. No argument begins with one.
    while instructions[best + 1].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        best += 1
    return str(instructions[best].argval)
