"""Views, strides, dtypes and kinds of tensors: what rounds a plain tensor rounds these alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.numerics.bitmask import masked, pack_between
from lightning_qat.numerics.fake_quantize import clamp_and_quantize, fake_quantize
from lightning_qat.numerics.learned_fake_quantize import learned_fake_quantize
from lightning_qat.numerics.min_max import batch_range, channel_ranges
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.recipe.specs import ActivationSpec

GRID = IntegerGrid(-8, 7)
SCALE, ZERO_POINT = torch.tensor(0.25), torch.tensor(1.0)


class Marked(Tensor):
    """A tensor's subclass without behaviour."""


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated view": torch._neg_view,
    "negated and transposed": lambda x: torch._neg_view(x).t(),
    "every other of a negated view": lambda x: torch._neg_view(x)[:, ::2],
    "imaginary part of a conjugate": lambda x: torch.complex(x, x.flip(0)).conj().imag,
    "real view of a conjugate": lambda x: torch.view_as_real(
        torch.complex(x, x).conj().resolve_conj()
    ),
    "transposed": lambda x: x.t(),
    "expanded": lambda x: x[:1].expand(5, -1),
    "overlapping": lambda x: x.reshape(-1).unfold(0, 8, 3),
    "nothing": lambda x: x[:0],
    "a number": lambda x: x[0, 0],
    "half": Tensor.half,
    "bfloat16": Tensor.bfloat16,
    "double": Tensor.double,
    "negated half": lambda x: torch._neg_view(x.half()),
    "parameter": nn.Parameter,
    "subclass": lambda x: x.as_subclass(Marked),
}


def plain(x: Tensor) -> Tensor:
    """The values in memory of their own, in order."""
    return torch.tensor(x.tolist(), dtype=x.dtype).reshape(x.shape)


def results(x: Tensor, upstream: Tensor) -> dict[str, Any]:
    """Everything that is computed of a tensor while a model trains."""
    found: dict[str, Any] = {}
    leaf = x.detach().requires_grad_() if x.is_leaf or x._base is None else x.detach()
    leaf.requires_grad_()
    scale = SCALE.clone().requires_grad_()
    ways: dict[str, Callable[[], Tensor]] = {
        "bits": lambda: fake_quantize(leaf, SCALE, ZERO_POINT, GRID),
        "input": lambda: fake_quantize(leaf, SCALE, ZERO_POINT, GRID, saves_input=True),
        "codes": lambda: fake_quantize(leaf, SCALE, ZERO_POINT, GRID, carries_int_repr=True),
        "weight": lambda: fake_quantize(leaf, SCALE, ZERO_POINT, GRID, gradient_everywhere=True),
        "learned": lambda: learned_fake_quantize(leaf, scale, None, GRID, normalized=False),
    }
    if x.dtype == torch.float32:
        ways["relu"] = lambda: clamp_and_quantize(leaf, (0.0, 6.0), SCALE, ZERO_POINT, GRID)
    for name, way in ways.items():
        y = way()
        found[name] = y.detach(), torch.autograd.grad(y, leaf, upstream)[0]
    if x.numel():
        found["range"] = batch_range(x)
        if x.dim() > 1:
            found["rows"] = channel_ranges(x.detach().float(), 0)
    return found


@pytest.mark.parametrize("negated_gradient", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_tensor_is_rounded_as_a_plain_one(kind: str, negated_gradient: bool) -> None:
    x = KINDS[kind](torch.randn(6, 700))
    upstream = torch.randn(x.shape, dtype=x.dtype)
    expected = results(plain(x), upstream)
    given = torch._neg_view(-upstream) if negated_gradient else upstream
    found = results(x, given)
    for name, values in expected.items():
        for one, other in zip(found[name], values, strict=True):
            assert one.dtype == other.dtype
            assert one.tolist() == other.tolist(), name


def test_a_mask_reads_a_negated_gradient_as_its_values() -> None:
    x, grad = torch.randn(700), torch.randn(700)
    bits = pack_between(x, -1.0, 1.0)
    with torch.no_grad():
        found = masked(torch._neg_view(-grad), bits, x.shape, x.stride())
    assert torch.equal(found, torch.where(x.abs() < 1.0, grad, 0.0))


def test_a_model_reads_a_negated_view_as_its_values() -> None:
    model = prepare_linear()
    x = torch.randn(5, 4)
    assert torch.equal(model(torch._neg_view(-x)), model(x))


def prepare_linear() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    prepare(model, "int8")
    model(torch.randn(5, 4))
    return model.eval()


def test_eight_bit_floats_have_a_range() -> None:
    x = torch.tensor([-1.5, 0.25, 3.0]).to(torch.float8_e4m3fn)
    assert batch_range(x).tolist() == [1.5, 3.0]


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "complex": (lambda x: torch.complex(x, x), "complex64"),
    "integers": (lambda x: x.to(torch.int64), "int64"),
    "bool": (lambda x: x > 0, "bool"),
    "sparse": (Tensor.to_sparse, "sparse_coo"),
    "sparse rows": (Tensor.to_sparse_csr, "sparse_csr"),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "qint8",
    ),
    "nested": (lambda x: torch.nested.as_nested_tensor([x[0], x[1, :2]]), "nested"),
}


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant).*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_quantizer_cannot_round_is_refused_with_its_kind(kind: str) -> None:
    make, said = REFUSED[kind]
    quantizer = ActivationQuantizer(ActivationSpec())
    quantizer(torch.randn(4))
    with pytest.raises(TypeError, match=f"dense tensors of real floating-point.*{said}"):
        quantizer(make(torch.randn(3, 4)))
