"""``scaled_dot_product_attention`` written out, and quantized inside."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

from lightning_qat.convert.convert import convert
from lightning_qat.function_hooks import attention
from lightning_qat.function_hooks.attention import attend, attention_arguments
from lightning_qat.prepare.prepare import prepare
from lightning_qat.quantizers.switches import switch
from lightning_qat.recipe.recipe import Recipe
from tests.joins.cases import calibrated, serving, the_plan
from tests.models import EVERY_LAYER

ALLOWED = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": ALLOWED},
    "mask per sample": {"attn_mask": ALLOWED[:, None, None].expand(3, 1, 1, 4)[[0, 2]]},
    "float mask": {"attn_mask": torch.linspace(-2, 1, 12).reshape(3, 4)},
    "mask of infinities": {"attn_mask": torch.zeros(3, 4).masked_fill(~ALLOWED, -math.inf)},
    "upper left": {"attn_mask": causal_upper_left(3, 4)},
    "lower right": {"attn_mask": causal_lower_right(3, 4)},
    "dropout": {"dropout_p": 0.4},
    "causal dropout": {"dropout_p": 0.4, "is_causal": True},
}


def tensors(heads: int = 4, shared: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A query of 3 steps of 4 heads, a key and a value of 4 steps, in a batch of 2."""
    shapes = ((2, heads, 3, 8), (2, shared, 4, 8), (2, shared, 4, 6))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def unchanged(number: int, x: Tensor) -> Tensor:
    return x


def without_rounding(*args: Any, **kwargs: Any) -> Tensor:
    return attend(*args, quantize=unchanged, **kwargs)


def with_gradients(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    y = function(*args, **kwargs)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    found = [y.detach(), *(x.grad.clone() for x in args)]
    for x in args:
        x.grad = None
    return found


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("shared", [4, 2, 1])
def test_written_out_it_is_torch_s_function_and_so_are_its_gradients(
    options: dict[str, Any], shared: int
) -> None:
    args = tensors(shared=shared)
    given = {**options, "enable_gqa": shared < 4}
    expected = with_gradients(F.scaled_dot_product_attention, *args, **given)
    found = with_gradients(without_rounding, *args, **given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_it_is_the_formula_in_double_precision() -> None:
    # Query head 2 of 4 reads head 1 of 2.
    q, k, v = (x.detach() for x in tensors(shared=2, dtype=torch.float64))
    found = without_rounding(q, k, v, attn_mask=ALLOWED, scale=0.7, enable_gqa=True)
    for n, head, row in ((0, 0, 0), (1, 2, 2), (1, 3, 0)):
        scores = [0.7 * float(q[n, head, row] @ k[n, head // 2, column]) for column in range(4)]
        terms = [math.exp(s) * bool(ALLOWED[row, c]) for c, s in enumerate(scores)]
        weights = torch.tensor([t / sum(terms) for t in terms], dtype=torch.float64)
        torch.testing.assert_close(found[n, head, row], weights @ v[n, head // 2])
    assert not found[:, :, 1].any()  # it may attend to nothing


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_any_number_of_batch_dimensions(dims: int) -> None:
    shape = (2, 3, 2, 5, 4)[-dims:]
    q, k, v = (torch.randn(shape) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(without_rounding(q, k, v, is_causal=True), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in tensors())
    seen: dict[int, Tensor] = {}
    found = attend(q, k, v, quantize=seen.setdefault, is_causal=True)
    assert found.dtype == dtype
    assert seen[attention.WEIGHTS].dtype == torch.float32
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_arguments_may_be_given_by_name_and_in_any_order() -> None:
    found = attention_arguments((1,), {"is_causal": True, "value": 3, "key": 2})
    assert found == ((1, 2, 3), {"is_causal": True})
    assert attention_arguments((1, 2, 3, 4, 0.5), {}) == (
        (1, 2, 3),
        {"attn_mask": 4, "dropout_p": 0.5},
    )


class Attends(nn.Module):
    """A projection, and attention to its own output in 2 heads; takes (batch, 5, 8)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv, self.options = nn.Linear(8, 24), options

    def heads(self, x: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, attn_mask=attn_mask, value=v, key=k, **self.options)
        return y.transpose(1, 2).flatten(2)


class WrittenByHand(Attends):
    """The same with matrix products and a softmax of one's own."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-2, -1) * 4**-0.5
        if self.options:
            later = torch.ones(5, 5, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return (F.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


NAME = "scaled_dot_product_attention"


def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call that is not handed to torch's fused function."""
    calls: list[int] = []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return attend(*args, **kwargs)

    monkeypatch.setattr(attention, "attend", watched)
    return calls


def test_five_operands_are_quantized_without_a_mask_and_four_with_one() -> None:
    x = torch.randn(3, 5, 8)
    model = calibrated(Attends(), x)
    assert the_plan(model).left_float == ()
    assert [t.spec.clip for t in the_plan(model).tensors if NAME in t.quantizer] == [
        *(None, None, None, None),
        (0.0, 255 / 256),
    ]
    causal = calibrated(Attends(is_causal=True), x)
    places = [c for t in the_plan(causal).tensors for c in t.consumers if NAME in c]
    assert places == [f"{NAME}:0[{i}]" for i in (0, 1, 2, 4)]


@pytest.mark.parametrize("causal", [False, True])
def test_it_computes_what_its_quantizers_called_by_hand_compute(causal: bool) -> None:
    x = torch.randn(3, 5, 8)
    model: Any = calibrated(Attends(is_causal=causal), x)
    q, k, v = (serving(model, "", NAME, i)(t) for i, t in enumerate(model.heads(x)))
    scores = q @ k.transpose(-2, -1) * 0.5
    if causal:
        weights = F.softmax(scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf), -1)
    else:
        weights = F.softmax(serving(model, "", NAME, 3)(scores), -1)
    y = (serving(model, "", NAME, 4)(weights) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(model(x), serving(model, "", "output")(y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["plain", "causal"])
@pytest.mark.parametrize("recipe", ["int8", EVERY_LAYER["w4a4"]], ids=["int8", "w4a4"])
def test_attention_written_by_hand_gives_the_same_numbers(
    options: dict[str, Any], recipe: Any
) -> None:
    x = torch.randn(3, 5, 8)
    fused, by_hand = Attends(**options), WrittenByHand(**options)
    by_hand.load_state_dict(fused.state_dict())
    calibrated(fused, x, recipe=recipe)
    calibrated(by_hand, x, recipe=recipe)
    torch.testing.assert_close(fused(x), by_hand(x), rtol=0, atol=1e-6)
    for model in (fused, by_hand):
        model.train()(x).square().sum().backward()
    torch.testing.assert_close(fused.qkv.weight.grad, by_hand.qkv.weight.grad, rtol=1e-4, atol=1e-5)


def test_while_nothing_is_quantized_torch_s_own_function_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, twin = torch.randn(3, 5, 8), Attends()
    model = copy.deepcopy(twin)
    prepare(model, "int8", x)
    calls = fused_calls(monkeypatch)
    switch(model, quantizing=False, observing=False)
    assert torch.equal(model(x), twin(x))
    assert calls == []
    switch(model, observing=True)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-6, atol=1e-6)
    assert len(calls) == 1  # the scores are observed
    switch(model, quantizing=True, observing=False)
    assert not torch.equal(model(x), twin(x))
    assert len(calls) == 2


def test_dropout_drops_weights_that_lie_on_the_grid_of_the_file() -> None:
    # Of equal weights of 1/4 half are doubled: their sum is a multiple of 1/2.
    model = Attends(dropout_p=0.5)
    with torch.no_grad():
        model.qkv.weight.zero_()
        model.qkv.bias.copy_(torch.tensor([0.0] * 16 + [1.0] * 8))
    x = torch.randn(6, 4, 8)
    prepare(model, Recipe(outputs=False), x)
    y = model.train()(x)
    assert {0.0, 0.5, 1.0} < set(y.detach().mul(100).round().div(100).unique().tolist())


def test_a_mask_never_reaches_a_range_and_a_call_without_one_still_finds_its_own() -> None:
    x = torch.randn(3, 5, 8)
    model = Attends()
    prepare(model, "int8", x)
    mask = torch.ones(5, 5).tril().bool()
    for _ in range(3):
        model.train()(x, mask)
        model(x, torch.zeros(5, 5).masked_fill(~mask, -math.inf))
    scores = serving(model, "", NAME, 3)
    assert scores.calibrated
    assert 0 < float(scores.max_val - scores.min_val) < 20
    assert torch.isfinite(model.eval()(x)).all()
    convert(model, x)


def test_what_the_example_has_no_mask_for_is_masked_all_the_same() -> None:
    x = torch.randn(3, 5, 8)
    model: Any = calibrated(Attends(), x)
    mask = torch.ones(5, 5).tril().bool()
    y = model(x, mask)
    changed = x.clone()
    changed[:, 3:] += 1.0
    torch.testing.assert_close(model(changed, mask)[:, :3], y[:, :3], rtol=0, atol=0)


def test_the_converted_graph_has_two_products_and_a_softmax() -> None:
    x = torch.randn(3, 5, 8)
    program = convert(calibrated(Attends(is_causal=True), x), x).program
    kinds = [getattr(n.target, "overloadpacket", None) for n in program.graph.nodes]
    assert kinds.count(torch.ops.aten.matmul) == 2
    assert kinds.count(torch.ops.aten.softmax) == 1
    assert torch.ops.aten.scaled_dot_product_attention not in kinds


def test_a_plan_of_an_earlier_version_goes_on_as_it_was() -> None:
    # It knew query, key and value only.
    x = torch.randn(3, 5, 8)
    model: Any = calibrated(Attends(), x)
    state = copy.deepcopy(model.state_dict())
    plan = the_plan(model).to_dict()
    inner = [f"qat_joins.{NAME}_0_{i}" for i in (3, 4)]
    plan["tensors"] = [t for t in plan["tensors"] if t["quantizer"] not in inner]
    for operands in plan["sites"][""].values():
        for number in ("3", "4"):
            operands.pop(number, None)
    state = {k: v for k, v in state.items() if not k.startswith(tuple(inner))}
    state["_qat_plan"] = plan
    earlier: Any = Attends()
    prepare(earlier, "int8")
    earlier.load_state_dict(state)
    earlier.eval()
    q, k, v = (serving(earlier, "", NAME, i)(t) for i, t in enumerate(earlier.heads(x)))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.equal(earlier(x), serving(earlier, "", "output")(y))


# Where torch runs it


class Checkpointed(nn.Module):
    def __init__(self, saves_memory: bool) -> None:
        super().__init__()
        self.block, self.saves_memory = Attends(is_causal=True), saves_memory

    def forward(self, x: Tensor) -> Tensor:
        if not self.saves_memory:
            return self.block(x)
        y: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return y


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.train().zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_activation_checkpointing_changes_nothing() -> None:
    x = torch.randn(3, 5, 8)
    plain, saving = Checkpointed(False), Checkpointed(True)
    saving.load_state_dict(plain.state_dict())
    for model in (plain, saving):
        prepare(model, "int8", x)
        gradients(model, x)
    for a, b in zip(gradients(plain, x), gradients(saving, x), strict=True):
        assert torch.equal(a, b)


def test_compact_memory_changes_nothing_and_keeps_fewer_bytes() -> None:
    x = torch.randn(8, 5, 8)
    model = Attends()
    twin = copy.deepcopy(model)
    prepare(model, "int8", x)
    prepare(twin, "int8", x, memory="compact")
    kept = []
    for each in (model, twin):
        gradients(each, x)
        sizes: list[int] = []

        def note(t: Any, sizes: list[int] = sizes) -> Any:
            sizes.append(t.untyped_storage().nbytes())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            each(x)
        kept.append(sum(sizes))
    for a, b in zip(gradients(model, x), gradients(twin, x), strict=True):
        assert torch.equal(a, b)
    assert kept[1] < kept[0]


def test_autocast_runs_both_products_in_half_precision() -> None:
    x = torch.randn(3, 5, 8)
    model = Attends(is_causal=True)
    prepare(model, "int8", x)
    y = gradients(model, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half, *grads = gradients(model, x)
    assert half.dtype == torch.bfloat16
    assert all(torch.isfinite(grad).all() for grad in grads)
    torch.testing.assert_close(half.float(), y, rtol=0, atol=0.1 * float(y.abs().max()))


def test_torch_s_choice_of_kernels_is_obeyed_where_torch_s_function_is_called() -> None:
    x = torch.randn(3, 5, 8)
    model = calibrated(Attends(), x)
    y = model(x)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(model(x), y)
    switch(model, quantizing=False)
    # The CPU has no such kernel, so torch refuses.
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError, match="kernel"):
        model(x)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["plain", "causal"])
def test_a_compiled_model_gives_the_same_numbers(options: dict[str, Any]) -> None:
    torch._dynamo.reset()  # shapes that other tests compiled would make this one's dynamic
    x = torch.randn(3, 5, 8)
    model = calibrated(Attends(**options), x)
    compiled: Any = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    if not options:
        assert torch.equal(compiled(x), model(x))
        mask = torch.ones(5, 5).tril(1).bool()
        torch.testing.assert_close(compiled(x, mask), model(x, mask), rtol=0, atol=1e-6)
    for a, b in zip(gradients(compiled, x), gradients(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
