"""Sizes and guards of a program are expressions; which of them are harmless to evaluate.

sympy evaluates what it reads: a tower of powers fills memory, and a product of sums that is
multiplied out takes exponential time. So names and functions are looked up in a list, and the
length of the result is estimated before sympy sees the text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from math import prod

_SYMBOL = re.compile(r"[A-Za-z_]\w{0,80}")
_FUNCTIONS = frozenset(
    "Symbol Integer Float Rational Add Mul Pow Max Min Mod Abs floor ceiling Eq Ne Lt Le Gt Ge And "
    "Or Not Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan FloorDiv "
    "ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv "
    "PowByNatural FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat "
    "TruncToInt RoundToInt ToFloat Identity".split()
)
_POWERS = ("Pow", "PowByNatural")
_NUMBERS = ("Integer", "Float", "Symbol")
_NAMES = re.compile(r"true|false|oo|int_oo|[A-Za-z]{1,12}\d+|L|len|max|min")
"""Names beside functions: constants, symbols, and what guards read."""
_NODES = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.UnaryOp),
    *(ast.BinOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
_GUARD_NODES = (*_NODES, ast.Subscript, ast.Attribute)
_LARGEST, _HIGHEST_POWER, _LONGEST = 2**63, 8, 4_000
_MOST_NODES, _MOST_TERMS = 400, 2_000
_LEAST_GROWTH = 1


def size_problems(text: str) -> Iterator[str]:
    """Why a size must not be evaluated; nothing if it is arithmetic on symbols."""
    if not _is_harmless(text, _NODES):
        yield f"a size must be arithmetic on symbols; got {text[:80]!r}"


def guard_problems(text: str) -> Iterator[str]:
    """Why a guard must not be evaluated; nothing if it compares sizes of inputs."""
    if not _is_harmless(text, _GUARD_NODES):
        yield f"a guard must compare sizes of inputs; got {text[:80]!r}"


def _is_harmless(text: str, nodes: tuple[type[ast.AST], ...]) -> bool:
    if len(text) > _LONGEST:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    walked = [*ast.walk(tree)]
    if len(walked) > 3 * _MOST_NODES:
        return False
    if not all(isinstance(node, nodes) and _is_allowed(node) for node in walked):
        return False
    return _terms(tree.body) <= _MOST_TERMS


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return bool(_SYMBOL.fullmatch(node.value))
        return isinstance(node.value, bool | int | float) and abs(node.value) <= _LARGEST
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or bool(_NAMES.fullmatch(node.id))
    if isinstance(node, ast.Attribute):
        return node.attr == "size"
    if isinstance(node, ast.Call):
        return _is_call_allowed(node)
    return not isinstance(node, ast.Pow | ast.LShift | ast.RShift | ast.MatMult)


def _is_call_allowed(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
        return not call.args and not call.keywords
    if not isinstance(call.func, ast.Name) or call.func.id not in _FUNCTIONS:
        return False
    if call.func.id in _NUMBERS:
        # A second argument of Float asks for so many digits.
        return len(call.args) == 1 and isinstance(call.args[0], ast.Constant | ast.UnaryOp)
    return call.func.id not in _POWERS or (len(call.args) == 2 and _power(call) is not None)


def _power(call: ast.Call) -> int | None:
    """A power's exponent, a small whole number; ``None``: it is something else."""
    numbers = [n for n in ast.walk(call.args[1]) if isinstance(n, ast.Constant)]
    if len(numbers) != 1 or type(numbers[0].value) is not int:
        return None
    value = numbers[0].value
    return value if abs(value) <= _HIGHEST_POWER else None


def _terms(node: ast.AST) -> int:
    """How many terms an expression has when it is multiplied out, at most; capped."""
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in _NUMBERS or not name:
            return _LEAST_GROWTH
        inside = [_terms(value) for value in node.args]
        if name in _POWERS:
            return _capped(max(2, inside[0]) ** max(abs(_power(node) or 1), 1))
        if name == "Mul":
            return _capped(prod(inside))
        return _capped(sum(inside))
    if isinstance(node, ast.BinOp):
        left, right = _terms(node.left), _terms(node.right)
        return _capped(left * right if isinstance(node.op, ast.Mult | ast.Div) else left + right)
    return _capped(max(1, sum(map(_terms, ast.iter_child_nodes(node)))))


def _capped(terms: int) -> int:
    return min(terms, _MOST_TERMS + 1)
