"""Attention that people write by hand: both products and the weights between them are on grids."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.joins.cases import calibrated

HEADS, LENGTH, FEATURES = 4, 9, 32


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.scale = (FEATURES // HEADS) ** -0.5

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v

    def merge(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        merged: Tensor = self.proj(x.transpose(1, 2).reshape(b, n, h * d))
        return merged


class Plain(_Attention):
    """timm's: one fused layer, dropout on the weights."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.merge(F.dropout(weights, 0.1, self.training) @ v)


class Upcast(_Attention):
    """Llama's softmax in float32."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = torch.matmul(q, k.transpose(2, 3)) * self.scale
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.merge(torch.matmul(weights, v))


class Window(_Attention):
    """Swin's table of relative positions, which is indexed."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(25, HEADS) * 0.02)
        places = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
        flat = places.flatten(1)
        relative = flat[:, :, None] - flat[:, None, :] + 2
        self.register_buffer("index", relative[0] * 5 + relative[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        bias = self.table[self.index.view(-1)].view(LENGTH, LENGTH, -1).permute(2, 0, 1)
        scores = (q * self.scale) @ k.transpose(-2, -1) + bias.contiguous().unsqueeze(0)
        return self.merge(scores.softmax(-1) @ v)


class Cosine(Window):
    """Swin v2's: normalized queries and keys, and a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.factor, max=4.6).exp()
        return self.merge(scores.softmax(-1) @ v)


class Relative(_Attention):
    """T5's embedding of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(2 * LENGTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        places = torch.arange(x.shape[1], device=x.device)
        distances = places[None, :] - places[:, None] + LENGTH
        scores = q @ k.transpose(3, 2) + self.bias(distances).permute([2, 0, 1]).unsqueeze(0)
        return self.merge(F.softmax(scores.float(), dim=-1).type_as(scores) @ v)


class Grouped(_Attention):
    """Two heads of keys for four of queries, repeated as Llama does."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        k, v = (self.repeated(t[:, :2]) for t in (k, v))
        weights = (q @ k.transpose(2, 3) * self.scale).softmax(-1)
        return self.merge(weights @ v)

    def repeated(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, HEADS // h, n, d).reshape(b, HEADS, n, d)


class Interleaved(Grouped):
    def repeated(self, x: Tensor) -> Tensor:
        return torch.repeat_interleave(x, HEADS // x.shape[1], dim=1)


class Einsum(_Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(-1)
        return self.merge(torch.einsum("bhij, bhjd -> bhid", weights, v))


class Biased(_Attention):
    """Bloom's: the bias of the distance is what ``baddbmm`` adds."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in self.split(x))
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=x.device).repeat(x.shape[0])
        distances = slopes[:, None, None] * torch.arange(x.shape[1], device=x.device)
        scores = torch.baddbmm(distances, q, k.transpose(1, 2), beta=1.0, alpha=self.scale)
        return self.merge((scores.softmax(-1) @ v).view(-1, HEADS, *v.shape[1:]))


class Products(TorchFunctionMode):
    """Notes how many values each operand of a batched product has."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        first = {"matmul": 0, "bmm": 0, "__matmul__": 0, "baddbmm": 1}.get(func.__name__)
        if first is not None:
            self.operands += args[first : first + 2]
        return func(*args, **(kwargs or {}))


KINDS = (Plain, Upcast, Window, Cosine, Relative, Grouped, Interleaved, Einsum, Biased)


@pytest.mark.parametrize("kind", KINDS)
def test_both_products_read_integers_and_the_weights_are_in_steps_of_1_256(
    kind: Callable[[], nn.Module],
) -> None:
    x = torch.randn(3, LENGTH, FEATURES)
    model = calibrated(kind(), x)
    inside = Products()
    # Entered first, so that it sees what the hooks hand on.
    with torch.no_grad(), inside:
        model(x)
    assert len(inside.operands) == 4
    # More elements than a grid of 8 bits has points; unquantized, they would be all different.
    for operand in inside.operands:
        assert operand.numel() > 300
        assert len(set(operand.flatten().tolist())) <= 256
    integers = inside.operands[2] * 256.0
    assert torch.equal(integers, integers.round())
