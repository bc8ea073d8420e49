"""An einsum of two tensors as a matrix product."""

import pytest
import torch
from torch import Tensor

from lightning_qat.numerics.einsum import is_product, product


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ik,kj->ij", ((2, 3), (3, 4))),
        ("bnd,df->bnf", ((2, 5, 3), (3, 4))),
        ("bhid,bhjd->bhij", ((2, 2, 5, 3), (2, 2, 4, 3))),
        ("bhij,bhjd->bihd", ((2, 2, 5, 4), (2, 2, 4, 3))),
        ("bid,bjd", ((2, 5, 3), (2, 4, 3))),
        ("nlhd,hde->nle", ((2, 5, 2, 3), (2, 3, 4))),
        ("bi,bi->b", ((2, 3), (2, 3))),
        ("i,i->", ((3,), (3,))),
        ("bxyd,bzd->bxyz", ((2, 3, 4, 5), (2, 6, 5))),
    ],
)
def test_an_einsum_is_the_matrix_product_that_it_is(
    equation: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    a, b = (torch.randn(shape) for shape in shapes)
    assert is_product(equation, (a, b))
    torch.testing.assert_close(product(equation, a, b), torch.einsum(equation, a, b))


@pytest.mark.parametrize(
    ("equation", "operands"),
    [
        ("ij,jk->j", (torch.ones(2, 3), torch.ones(3, 4))),  # i is summed in one of them
        ("ij,ij->ij", (torch.ones(2, 3), torch.ones(2, 3))),  # nothing is summed
        ("ii,ij->j", (torch.ones(2, 2), torch.ones(2, 3))),  # a diagonal
        ("...ij,jk->...ik", (torch.ones(2, 3), torch.ones(3, 4))),
        ("ij,jk->ik", (torch.ones(2, 1), torch.ones(3, 4))),  # j of size 1 is repeated
        ("ij,jk,kl->il", (torch.ones(2, 2),) * 3),
        ("ij->ji", (torch.ones(2, 3),)),
        (torch.ones(2), ()),
    ],
)
def test_other_equations_are_no_products(equation: object, operands: tuple[Tensor, ...]) -> None:
    assert not is_product(equation, operands)
