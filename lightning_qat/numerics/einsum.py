"""``einsum`` of two tensors as the matrix product that it is, for targets that know no einsum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_qat.numerics.int_repr import saving_int_repr

EINSUM: Callable[..., Tensor] = torch.einsum


def is_product(equation: Any, operands: tuple[Any, ...]) -> bool:
    """Whether an equation sums over indices that both of two tensors have, and over no others.

    Args:
        equation: As ``torch.einsum`` takes it.
        operands: The tensors behind it.

    Example:
        >>> import torch
        >>> two = (torch.ones(2, 3), torch.ones(3, 4))
        >>> is_product("ik, kj -> ij", two), is_product("ij,jk->j", two)
        (True, False)
    """
    if not isinstance(equation, str) or len(operands) != 2:
        return False
    a, b, out = _indices(equation)
    shapes = [x.shape for x in operands if isinstance(x, Tensor)]
    if [len(shape) for shape in shapes] != [len(a), len(b)] or "." in a + b:
        return False
    unique = all(len(set(names)) == len(names) for names in (a, b, out))
    summed = (set(a) | set(b)) - set(out)
    sizes = dict(zip(a, shapes[0], strict=True))
    # An index of size 1 may be another operand's of any size.
    equal = all(sizes.get(name, size) == size for name, size in zip(b, shapes[1], strict=True))
    return unique and equal and bool(summed) and summed <= set(a) & set(b)


def product(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """``torch.einsum`` of an equation for which ``is_product`` holds, by ``torch.matmul``.

    Args:
        equation: Such as ``bhid,bhjd->bhij``.
        a: The first operand.
        b: The second operand.

    Returns:
        The same values as ``torch.einsum``, up to the order of sums.
    """
    first, second, out = _indices(equation)
    batch = [n for n in out if n in first and n in second]
    rows = [n for n in out if n not in second]
    columns = [n for n in out if n not in first]
    summed = [n for n in first if n in second and n not in out]
    size = dict(zip(first + second, (*a.shape, *b.shape), strict=True))
    left = _permuted(a, first, (*batch, *rows, *summed))
    right = _permuted(b, second, (*batch, *summed, *columns))
    # Without a batch the rows may be several axes.
    one_row = (-1,) if batch and len(rows) != 1 else tuple(size[n] for n in rows)
    sizes = tuple(size[n] for n in batch)
    depth = math.prod(size[n] for n in summed)
    left = _reshaped(left, (*sizes, *one_row, depth), len(summed) != 1 or one_row == (-1,))
    width = math.prod(size[n] for n in columns)
    right = _reshaped(right, (*sizes, depth, width), len(summed) != 1 or len(columns) != 1)
    with saving_int_repr(a, b):
        result = torch.matmul(left, right)
    named = (*batch, *rows, *columns)
    result = _reshaped(result, tuple(size[n] for n in named), one_row == (-1,) or len(columns) != 1)
    return _permuted(result, "".join(named), tuple(out))


def _indices(equation: str) -> tuple[str, str, str]:
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    if not arrow:
        # Those that occur once, in alphabetical order.
        out = "".join(sorted(n for n in first + second if (first + second).count(n) == 1))
    return first, second, out


def _permuted(x: Tensor, names: str, order: tuple[str, ...]) -> Tensor:
    places = [names.index(name) for name in order]
    return x if places == sorted(places) else x.permute(places)


def _reshaped(x: Tensor, shape: tuple[Any, ...], changes: bool) -> Tensor:
    return x.reshape(shape) if changes else x
