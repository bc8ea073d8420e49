"""What the plan says of attention: quantized, or float with the reason; masks are in no range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe

NAME = "scaled_dot_product_attention"
FORBIDDEN = torch.ones(5, 5).triu(1).bool()


class Attention(nn.Module):
    """Self-attention of 2 heads; takes (batch, 5, 8)."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.proj, self.attend = nn.Linear(8, 24), nn.Linear(8, 8), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attend: Callable[..., Tensor] = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.attn, self.fc = Attention(attend), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.attn(x))


def planned(model: nn.Module, recipe: Any = "int8") -> JoinPlan:
    report = prepare(model, recipe, torch.randn(3, 5, 8))
    assert report.joins is not None
    return report.joins


def of_attention(plan: JoinPlan) -> list[str]:
    return [t.quantizer for t in plan.tensors if NAME in t.quantizer]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(exclude=("attn",)), "attn is not selected by the recipe"),
        (Recipe(joins=False), "the recipe has joins=False"),
    ],
    ids=["excluded", "no joins"],
)
def test_attention_that_the_recipe_leaves_float_is_listed_with_the_reason(
    recipe: Recipe, reason: str
) -> None:
    plan = planned(Block(), recipe)
    assert of_attention(plan) == []
    assert f"attn.{NAME}:0[0]: {reason}" in plan.left_float
    assert "0 calls left float" not in str(plan)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_attention_of_nested_tensors_stays_float_and_is_listed() -> None:
    def nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor(
                list(x.detach().transpose(1, 2)), layout=torch.jagged
            ).transpose(1, 2)
            for x in (q, k, v)
        )
        found: Any = F.scaled_dot_product_attention(q, k, v)
        return torch.stack([x.transpose(0, 1) for x in found.transpose(1, 2).unbind()])

    plan = planned(Block(nested))
    assert of_attention(plan) == []
    assert f"attn.{NAME}: nested tensors" in plan.left_float


def test_empty_queries_are_no_plan_and_the_next_batch_makes_it() -> None:
    model = Block()
    prepare(model, "int8")
    model.train()(torch.randn(0, 5, 8))
    model(torch.randn(3, 5, 8))
    assert any(NAME in name for name, _ in model.named_modules())


class Pool(nn.Module):
    """Attention by torch's one function, as CLIP's pooling has it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        attn = self.attn
        weights = (attn.in_proj_weight, attn.in_proj_bias, None, None, False, 0.0)
        out = (attn.out_proj.weight, attn.out_proj.bias)
        return self.fc(F.multi_head_attention_forward(x, x, x, 8, 2, *weights, *out)[0])


def test_torch_s_own_attention_is_named_where_it_stays_float() -> None:
    class Net(Pool):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attn(x, x, x, need_weights=False)[0])

    report = prepare(Net(), Recipe(exclude=("attn",)), torch.randn(3, 5, 8))
    assert [layer.name for layer in report.skipped] == ["attn"]
    plan = planned(Pool(), Recipe(exclude=("attn",)))
    assert "multi_head_attention_forward: no integer form is known" in plan.left_float


# Masks of attention that is written by hand

MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_fill": lambda scores: scores.masked_fill(FORBIDDEN, -math.inf),
    "masked_fill, least number": lambda scores: scores.masked_fill(
        FORBIDDEN, torch.finfo(scores.dtype).min
    ),
    "masked_fill in place": lambda scores: (scores * 1).masked_fill_(FORBIDDEN, -1e4),
    "where": lambda scores: torch.where(FORBIDDEN, -math.inf, scores),
    "added": lambda scores: scores + torch.zeros(5, 5).masked_fill(FORBIDDEN, -math.inf),
}


@pytest.mark.parametrize("mask", MASKED.values(), ids=MASKED)
def test_a_softmax_of_masked_scores_reads_float(mask: Callable[[Tensor], Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(mask(q @ k.transpose(-2, -1) * 0.5), -1) @ v

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    x = torch.randn(3, 5, 8)
    model, fused = Block(attend), Block(causal)
    fused.load_state_dict(model.state_dict())
    for each in (model, fused):
        prepare(each, "int8", x)
        for _ in range(3):
            each.train()(x)
    torch.testing.assert_close(model.eval()(x), fused.eval()(x), rtol=0, atol=1e-6)
    quantized = convert(model, x)
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("least", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_a_mask_of_large_numbers_that_is_added_does_not_become_the_softmax_s_range(
    least: float,
) -> None:
    mask = torch.zeros(5, 5).masked_fill(FORBIDDEN, least)
    model = Block(lambda q, k, v: F.softmax(q @ k.transpose(-2, -1) + mask, -1) @ v)
    x = torch.randn(3, 5, 8)
    expected = model(x)
    plan = planned(model)
    assert [c for c in plan.left_float if "holds a mask" in c and ".softmax:0[0]" in c]
    for _ in range(3):
        model.train()(x)
    # The mask's grid holds zero and the least number exactly.
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=0.1)


def test_a_softmax_of_finite_scores_with_a_bias_is_quantized() -> None:
    # A relative position bias, as a Swin transformer's.
    bias = torch.randn(5, 5)
    plan = planned(Block(lambda q, k, v: F.softmax(q @ k.transpose(-2, -1) + bias, -1) @ v))
    assert any("softmax" in c for t in plan.tensors for c in t.consumers)
    assert plan.left_float == ()
