"""Large tensors go piece by piece, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_qat import pieces as module
from lightning_qat.fake_quantization import clamp_and_quantize, fake_quantize
from lightning_qat.learned import learned_fake_quantize
from lightning_qat.pieces import pieces
from lightning_qat.qparams import Grid

GRID = Grid(-128, 127)
ZERO = torch.tensor(3.0)


def fixed(x: Tensor, scale: Tensor) -> Tensor:
    return fake_quantize(x, scale.detach(), ZERO, GRID, saves_input=True)


def clamped(x: Tensor, scale: Tensor) -> Tensor:
    return clamp_and_quantize(x, (0.0, 2.0), scale.detach(), ZERO, GRID)


def learned(x: Tensor, scale: Tensor) -> Tensor:
    return learned_fake_quantize(x, scale, None, GRID, saves_input=True)


def learned_ends(x: Tensor, scale: Tensor) -> Tensor:
    low = torch.tensor(-1.0, requires_grad=True)
    return learned_fake_quantize(x, scale, low, GRID, saves_input=True)


def strided(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 10)
    torch.set_num_threads(1)


@pytest.mark.usefixtures("small_pieces")
def test_parts_are_flat_and_all_there() -> None:
    x, y = strided((2, 3, 5, 7)), strided((2, 3, 5, 7))
    parts = list(pieces(x, y))
    assert [len(one) for one, _ in parts] == 21 * [10]
    torch.testing.assert_close(torch.cat([one for one, _ in parts]), x.permute(0, 2, 3, 1).ravel())
    for one, other in parts:
        one.add_(1)
        other.zero_()
    assert not y.any()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "tensors",
    [
        (torch.zeros(8, 8), torch.zeros(8, 8).t()),
        (torch.zeros(20, 16)[:, ::2],),
        (torch.zeros(79),),
        (torch.zeros(1).expand(400),),
    ],
    ids=["other order", "gaps", "small", "overlapping"],
)
def test_what_cannot_be_parted_stays_whole(tensors: tuple[Tensor, ...]) -> None:
    assert list(pieces(*tensors)) == [tensors]


@pytest.mark.parametrize("quantize", [fixed, clamped, learned, learned_ends])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_quantization_in_pieces(
    quantize: Callable[[Tensor, Tensor], Tensor], last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = strided((3, 8, 9, 7)) if last else torch.randn(3, 8, 9, 7)
    upstream = torch.randn_like(x)
    found = []
    for piece in (2**18, 10):
        monkeypatch.setattr(module, "PIECE", piece)
        assert len(list(pieces(x))) == (1 if piece > 10 else 152)
        given, scale = x.clone().requires_grad_(), torch.tensor(0.01, requires_grad=True)
        result = quantize(given, scale)
        result.backward(upstream)
        found.append((result.detach(), given.grad, scale.grad))
    for whole, parted in zip(*found, strict=True):
        torch.testing.assert_close(whole, parted, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=0, atol=0)
    assert found[0][0].stride() == found[1][0].stride() == x.stride()
