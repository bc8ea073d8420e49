"""Recurrent layers in training: plans, checkpoints, compile, autocast, learned scales."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qat import Recipe, prepare
from lightning_qat.layers import QATLayer
from lightning_qat.prepare.prepare_like import prepare_like
from tests.layers.recurrent_cases import (
    BATCH,
    FEATURES,
    HIDDEN,
    KINDS,
    STEPS,
    Tagger,
    assert_same,
    float_layer,
    initial_state,
    qat_layer,
    sequence,
    trained,
)
from tests.models import EVERY_LAYER

# torch's own remark on its float LSTM.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_sees_the_layer_and_not_what_is_inside(kind: str) -> None:
    model = Tagger(kind)
    joins = prepare(model, "int8", torch.randn(2, STEPS, FEATURES)).joins
    assert joins is not None
    assert [(t.producers, t.quantizer, t.consumers) for t in joins.tensors] == [
        (("input",), "embed.input_quantizer", ("embed",)),
        (("relu",), "rnn.input_quantizer", ("rnn", "skip")),
        (("rnn",), "head.input_quantizer", ("head",)),
        (("head.linear",), "qat_joins.add_0_0", ("add:0[0]",)),
        (("skip.linear",), "qat_joins.add_0_1", ("add:0[1]",)),
        (("add",), "qat_joins.output_0_0", ("output:0[0]",)),
    ]
    assert joins.left_float == ()
    assert model.skip.input_quantizer is model.rnn.input_quantizer
    assert model.rnn.input_quantizer.spec.fixed_min
    assert not model.rnn.hidden_quantizer_l0.spec.fixed_min


@pytest.mark.parametrize("recipe", ["int8", "amct"])
def test_planning_at_the_first_batch_gives_the_same_plan_without_a_warning(recipe: str) -> None:
    x = torch.randn(2, STEPS, FEATURES)
    early, late = Tagger(), Tagger()
    expected = prepare(early, recipe, x).joins
    assert prepare(late, recipe).joins is None
    for _ in range(2):
        late.train()(x)
    assert prepare(late, recipe).joins == expected
    # A learned range observes one batch, then it learns.
    assert late.rnn.hidden_quantizer_l0.batches == (1 if recipe == "amct" else 2)


def test_recipes_reach_recurrent_layers() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.GRU(3, 4), "c": nn.GRU(3, 4)})
    recipe = Recipe(overrides={"type:LSTM": {"weight": {"bits": 4}}, "c": None})
    report = prepare(model, recipe)
    assert str(report).splitlines() == [
        "2 layers quantized, 1 left as they are",
        "  a  LSTM: weight 4 bits per_channel minmax, input 8 bits affine",
        "  b  GRU: weight 8 bits per_channel minmax, input 8 bits affine",
        "  c  GRU: left as it is, kept float by the recipe (overrides: 'c': None)",
    ]
    assert model["a"].weight_quantizer_hh_l0.spec.bits == 4
    assert prepare(nn.ModuleList([nn.GRU(3, 4)]), "amct").swapped[0].spec.weight.quantizer == "arq"


@pytest.mark.parametrize("recipe", ["int8", "amct", "w4a8"])
def test_a_checkpoint_tells_what_to_prepare(recipe: str) -> None:
    x = torch.randn(2, STEPS, FEATURES)
    options = {"num_layers": 2, "bidirectional": True}
    model = trained(Tagger("lstm projected", **options), x, recipe=EVERY_LAYER.get(recipe, recipe))
    other = Tagger("lstm projected", **options)
    prepare_like(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model(x))
    assert isinstance(other.rnn, QATLayer)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_computes_and_observes_the_same(kind: str) -> None:
    torch._dynamo.reset()
    # The first step reads the state that is given, the second one that was computed.
    model, x = Tagger(kind), torch.randn(2, 2, FEATURES)
    trained(model, x).train().zero_grad()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager")
    for _ in range(2):
        x = torch.randn_like(x)
        outputs = [net(x) for net in (model, compiled)]
        assert torch.equal(*outputs)
        for output in outputs:
            output.square().mean().backward()
    pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for (_, a), b in pairs)  # type: ignore[arg-type]
    pairs = zip(model.named_buffers(), twin.buffers(), strict=True)  # type: ignore[assignment]
    assert all(torch.equal(a, b) for (_, a), b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_ranges_and_gradients_in_float32(kind: str) -> None:
    layer, x = qat_layer(kind, num_layers=2), sequence("padded")
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = layer(x)
        output.float().square().sum().backward()
    assert layer.hidden_quantizer_l0.max_val.dtype is torch.float32
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in layer.parameters())


# Learned quantizers and searched ranges


@pytest.mark.parametrize("quantizer", ["learned", "ulq"])
@pytest.mark.parametrize("kind", KINDS)
def test_learned_grids_get_gradients_from_every_step(kind: str, quantizer: str) -> None:
    recipe = {"weight": {"quantizer": quantizer}, "activation": {"quantizer": quantizer}}
    layer, x = qat_layer(kind, config=recipe), sequence("padded")
    # The first forward tells where learning starts.
    for _ in range(2):
        layer.zero_grad()
        layer(x * 2)[0].square().sum().backward()
    names = [name for name, _ in layer.named_parameters() if "quantizer" in name]
    assert any(name.startswith("hidden_quantizer_l0.") for name in names)
    assert any(name.startswith("weight_quantizer_hh_l0.") for name in names)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
    hidden = [p.grad for p in layer.hidden_quantizer_l0.parameters()]
    assert any(bool(grad.abs() > 0) for grad in hidden)


def lsq(x: Tensor, scale: Tensor, values: int) -> Tensor:
    """LSQ on -128..127 in the precision of ``x``; ``values`` share the scale (arXiv:1902.08153)."""
    factor = (values * 127) ** -0.5
    scale = scale * factor + (scale * (1 - factor)).detach()
    exact = (x / scale).detach()
    steps = exact.round()
    inside = x + (steps - exact) * scale - (steps - exact) * scale.detach()
    inside = inside + (steps * scale.detach() - x).detach()
    return torch.where(steps < -128, -128 * scale, torch.where(steps > 127, 127 * scale, inside))


@pytest.mark.parametrize("lengths", [None, [5, 2, 4]], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_learned_scale_s_gradient_is_divided_by_all_steps_that_share_it(
    kind: str, lengths: list[int] | None
) -> None:
    recipe = {"activation": {"quantizer": "learned", "symmetric": True}}
    layer, x = qat_layer(kind, config=recipe), sequence("padded")
    layer(x)
    for name, quantizer in layer.named_children():
        if name.startswith("weight"):
            setattr(layer, name, nn.Identity())
        elif name == "input_quantizer":
            quantizer.quantizing = quantizer.observing = False
    width = layer.hidden_quantizer_l0.half_width
    with torch.no_grad():
        # Some states lie outside.
        width.mul_(0.7)
    scale = width / 128
    given = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    output = layer(given)[0]
    (output if lengths is None else output.data).square().sum().backward()

    twin = layer.to_float().double()
    wide = scale.detach().double().requires_grad_()
    lengths = lengths or [STEPS] * BATCH
    loss = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(lengths):
        h, c = torch.zeros(2, HIDDEN, dtype=torch.float64)
        for t in range(length):
            read = lsq(h, wide, sum(lengths) * HIDDEN)
            from_x = F.linear(x[t, row].double(), twin.weight_ih_l0, twin.bias_ih_l0)
            from_h = F.linear(read, twin.weight_hh_l0, twin.bias_hh_l0)
            if kind == "lstm":
                i, f, g, o = (from_x + from_h).chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (rx, zx, nx), (rh, zh, nh) = from_x.chunk(3), from_h.chunk(3)
                n, z = torch.tanh(nx + torch.sigmoid(rx + rh) * nh), torch.sigmoid(zx + zh)
                h = n + z * (h - n)
            loss = loss + h.square().sum()
    loss.backward()
    assert wide.grad is not None
    assert abs(float(wide.grad)) > 1e-3
    torch.testing.assert_close(width.grad, wide.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantizer", ["learned", "ulq"])
@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_leave_learned_grids_as_they_are(kind: str, quantizer: str) -> None:
    recipe = {"weight": {"quantizer": quantizer}, "activation": {"quantizer": quantizer}}
    layer = qat_layer(kind, config=recipe)
    layer(sequence("padded"))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    torch.manual_seed(3)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]) == ("quantizer" in name), name
    torch.manual_seed(3)
    expected = float_layer(kind)
    assert_same(layer.to_float().state_dict(), expected.state_dict(), 0)


class HostReads(TorchDispatchMode):
    """Counts the numbers that are fetched from tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantizer", ["observed", "learned", "ulq"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_a_number(kind: str, quantizer: str) -> None:
    layer = qat_layer(kind, config={"activation": {"quantizer": quantizer}})
    layer(sequence("padded"))
    counts = []
    for steps in (2, 7):
        with HostReads() as reads:
            layer(torch.randn(steps, BATCH, FEATURES))[0].sum().backward()
        counts.append(reads.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("calibration", ["mse", "percentile", "entropy"])
def test_a_search_for_the_range_sees_all_steps_at_once(calibration: str) -> None:
    layer = qat_layer("gru", config={"activation": {"calibration": calibration}})
    alone = copy.deepcopy(layer.hidden_quantizer_l0)
    hx = initial_state(layer, "padded")
    output, _ = layer(sequence("padded"), hx)
    alone(torch.cat((hx, output[:-1])))
    assert torch.equal(layer.hidden_quantizer_l0.min_val, alone.min_val)
    assert torch.equal(layer.hidden_quantizer_l0.max_val, alone.max_val)
