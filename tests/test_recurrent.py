"""LSTM and GRU: float semantics in every form, one range for all steps, gradients, files."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
    unpad_sequence,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qat import QuantizedModel, Recipe, convert, export, prepare, verify
from lightning_qat.convert.capture import CaptureError
from lightning_qat.ir.ops import as_dequantize, as_fake_quantize
from lightning_qat.layers import GRUQAT, LSTMQAT, QATLayer
from lightning_qat.prepare.prepare_like import prepare_like
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.specs import WeightSpec
from lightning_qat.training.range_sync import commit_ranges
from tests.models import EVERY_LAYER

# torch's own remark on its float LSTM.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

STEPS, BATCH, FEATURES, HIDDEN = 5, 3, 3, 4
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (LSTMQAT, {}),
    "lstm projected": (LSTMQAT, {"proj_size": 2}),
    "gru": (GRUQAT, {}),
}


def float_layer(kind: str, **options: Any) -> Any:
    qat, more = KINDS[kind]
    return qat.float_class(FEATURES, HIDDEN, **more, **options)


def qat_layer(kind: str, **options: Any) -> Any:
    qat, more = KINDS[kind]
    return qat(FEATURES, HIDDEN, **more, **options)


def without_quantization(layer: Any) -> Any:
    for name, quantizer in list(layer.named_children()):
        if isinstance(quantizer, WeightQuantizer):
            setattr(layer, name, nn.Identity())
        else:
            quantizer.quantizing = False
    return layer


def sequence(form: str, batch_first: bool = False) -> Any:
    if form == "one":
        return torch.randn(STEPS, FEATURES)
    shape = (BATCH, STEPS) if batch_first else (STEPS, BATCH)
    x = torch.randn(*shape, FEATURES)
    if form == "padded":
        return x
    lengths = torch.tensor([3, STEPS, 1])
    return pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)


def initial_state(layer: Any, form: str) -> Any:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = () if form == "one" else (BATCH,)
    h = torch.randn(count, *batch, layer.proj_size or HIDDEN)
    return (h, torch.randn(count, *batch, HIDDEN)) if isinstance(layer, nn.LSTM) else h


def assert_same(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    ours, ours_spec = pytree.tree_flatten(found)
    theirs, spec = pytree.tree_flatten(expected)
    assert ours_spec == spec
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# Without quantization it is the float layer


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("form", ["padded", "one", "packed"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_without_quantization_it_is_the_float_layer(
    kind: str,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    bias: bool,
    form: str,
    given: bool,
) -> None:
    layer = float_layer(
        kind,
        num_layers=num_layers,
        bidirectional=bidirectional,
        batch_first=batch_first,
        bias=bias,
    )
    qat = without_quantization(KINDS[kind][0].from_float(layer))
    x = sequence(form, batch_first)
    hx = initial_state(layer, form) if given else None
    for training in (True, False):
        assert_same(qat.train(training)(x, hx), layer.train(training)(x, hx))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_between_the_layers_in_training_only(kind: str) -> None:
    layer = float_layer(kind, num_layers=3, dropout=0.4)
    qat = without_quantization(KINDS[kind][0].from_float(layer))
    x = sequence("padded")
    for training in (True, False):
        torch.manual_seed(1)
        expected = layer.train(training)(x)
        torch.manual_seed(1)
        assert_same(qat.train(training)(x), expected)
    assert not torch.equal(qat.train()(x)[0], qat.eval()(x)[0])


# The quantized forward, beside a loop that uses torch's own fake quantization


def on_a_binary_grid(layer: Any) -> Any:
    """Ranges whose scales are powers of two: exact in every framework."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name.startswith("weight"):
                weight.mul_(0.9 / weight.abs().max())
                weight[:, 0] = 127 / 128
    for quantizer in layer.children():
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.min_val.fill_(-1.0)
            quantizer.max_val.fill_(127 / 128)
            quantizer.batches.fill_(1.0)
            quantizer.calibrated = True
            quantizer.observing = False
    return layer


def reference(layer: Any, x: Tensor) -> Tensor:
    """Output of a layer on a binary grid, time first: cell by cell, step by step."""

    def quantized(value: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(value, 2.0**-7, 0, -128, 127)

    def weight_of(name: str) -> Tensor:
        weight = getattr(layer, name)
        rows = len(weight)
        scale, origin = torch.full((rows,), 2.0**-7), torch.zeros(rows, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, origin, 0, -127, 127)

    for k in range(layer.num_layers):
        outputs = []
        for end in (f"_l{k}", f"_l{k}_reverse") if layer.bidirectional else (f"_l{k}",):
            w, r = weight_of(f"weight_ih{end}"), weight_of(f"weight_hh{end}")
            b, d = getattr(layer, f"bias_ih{end}"), getattr(layer, f"bias_hh{end}")
            h = torch.zeros(x.shape[1], layer.proj_size or HIDDEN)
            c = torch.zeros(x.shape[1], HIDDEN)
            states: dict[int, Tensor] = {}
            order = range(len(x))
            for t in reversed(order) if end.endswith("reverse") else order:
                from_x, from_h = F.linear(quantized(x[t]), w, b), F.linear(quantized(h), r, d)
                if isinstance(layer, nn.LSTM):
                    i, f, g, o = (from_x + from_h).split(HIDDEN, 1)
                    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                    h = torch.sigmoid(o) * torch.tanh(c)
                    if layer.proj_size:
                        h = F.linear(quantized(h), weight_of(f"weight_hr{end}"))
                else:
                    (rx, zx, nx), (rh, zh, nh) = from_x.split(HIDDEN, 1), from_h.split(HIDDEN, 1)
                    n, z = torch.tanh(nx + torch.sigmoid(rx + rh) * nh), torch.sigmoid(zx + zh)
                    h = (1 - z) * n + z * h
                states[t] = h
            outputs.append(torch.stack([states[t] for t in order]))
        x = torch.cat(outputs, 2)
    return x


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_a_loop_over_fake_quantized_tensors(
    kind: str, options: dict[str, Any]
) -> None:
    layer = on_a_binary_grid(qat_layer(kind, **options))
    x, weighing = torch.randn(6, 8, FEATURES).mul_(0.5).requires_grad_(), torch.randn(8)
    leaves = dict(layer.named_parameters())
    results = []
    for output in (layer(x)[0], reference(layer, x)):
        loss = (output.transpose(1, 2) * weighing).square().sum()
        results.append((output, torch.autograd.grad(loss, [x, *leaves.values()])))
    (ours, ours_grads), (theirs, theirs_grads) = results
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for name, a, b in zip(["input", *leaves], ours_grads, theirs_grads, strict=True):
        assert bool(a.abs().sum() > 0), name
        # Summed in another order: all steps in one matmul.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_quantization_changes_the_output(kind: str) -> None:
    layer, x = qat_layer(kind, config="w4a4"), sequence("padded")
    layer(x)
    assert not torch.allclose(layer(x)[0], layer.to_float()(x)[0], atol=1e-3)


# One range for all steps, one rounding of the weights


@pytest.mark.parametrize("form", ["padded", "one", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_once_and_ranges_observed_once_per_forward(
    kind: str, form: str
) -> None:
    layer = qat_layer(kind, num_layers=2, bidirectional=True)
    calls: dict[str, int] = {}
    for name, quantizer in layer.named_children():
        if isinstance(quantizer, WeightQuantizer):
            count = lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})  # noqa: E731
            quantizer.register_forward_hook(count)
    layer(sequence(form))
    names = {name for name, _ in layer.named_children() if name.startswith("weight")}
    assert calls == dict.fromkeys(names, 1)
    activations = [q for q in layer.children() if isinstance(q, ActivationQuantizer)]
    assert len(activations) == 2 + 4 + (4 if layer.proj_size else 0)
    assert all(q.batches == 1 for q in activations)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_hidden_state_s_range_is_that_of_all_states_that_a_step_reads(kind: str) -> None:
    layer, x = without_quantization(qat_layer(kind)), sequence("padded")
    hx = initial_state(layer, "padded")
    output, _ = layer(x, hx)
    first = hx[0] if isinstance(hx, tuple) else hx
    read = torch.cat((first, output[:-1]))
    quantizer = layer.hidden_quantizer_l0
    assert (quantizer.min_val, quantizer.max_val) == (read.min(), read.max())
    assert (layer.input_quantizer.min_val, layer.input_quantizer.max_val) == (x.min(), x.max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_changes_after_the_last_step_and_not_between_steps(kind: str) -> None:
    layer = qat_layer(kind)
    layer.input_quantizer.observing = False
    twin = copy.deepcopy(layer).requires_grad_(False)
    x = sequence("padded")
    # No range is known in the first forward; the second one has that of the first.
    for _ in range(2):
        expected = copy.deepcopy(twin).eval()(x)
        assert_same(twin(x), expected, 0)
    assert twin.hidden_quantizer_l0.batches == 2


def test_deferred_observations_wait_for_the_commit() -> None:
    layer = qat_layer("lstm projected")
    for quantizer in (layer.hidden_quantizer_l0, layer.projection_quantizer_l0):
        quantizer.deferred = True
    layer(sequence("padded"))
    assert layer.hidden_quantizer_l0.batches == 0
    commit_ranges(layer)
    assert layer.hidden_quantizer_l0.batches == 1
    assert layer.projection_quantizer_l0.batches == 1


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_observed_in_eval_mode(kind: str) -> None:
    layer = qat_layer(kind).eval()
    layer(sequence("padded"))
    quantizers = [q for q in layer.children() if isinstance(q, ActivationQuantizer)]
    assert all(q.batches == 0 and q.pending is None for q in quantizers)


def test_sequences_of_a_packed_batch_do_not_see_each_other() -> None:
    layer = on_a_binary_grid(qat_layer("gru", bidirectional=True))
    x, lengths = torch.randn(STEPS, BATCH, FEATURES), torch.tensor([4, 2, 5])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, h = layer(packed)
    assert isinstance(output, PackedSequence)
    padded, _ = pad_packed_sequence(output)
    for number, alone in enumerate(unpad_sequence(x, lengths)):
        expected, last = layer(alone)
        torch.testing.assert_close(padded[: lengths[number], number], expected)
        torch.testing.assert_close(h[:, number], last)


# There and back


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_weights_have_the_names_of_the_float_layer(kind: str) -> None:
    layer = float_layer(kind, num_layers=2, bidirectional=True)
    names = list(layer.state_dict())
    qat = KINDS[kind][0].from_float(layer)
    assert type(layer) is KINDS[kind][0].float_class
    assert not list(layer.children())
    assert dict(qat.named_parameters()).keys() == dict(layer.named_parameters()).keys()
    assert all(getattr(qat, name) is getattr(layer, name) for name in names)
    assert [name for name in qat.state_dict() if "quantizer" not in name] == names
    back = qat.to_float()
    assert type(back) is type(layer)
    assert repr(back) == repr(layer)
    x = sequence("padded")
    assert_same(back(x), layer(x), 0)
    other = float_layer(kind, num_layers=2, bidirectional=True)
    qat.load_state_dict(other.state_dict())
    assert_same(qat.to_float()(x), other(x), 0)
    other.load_state_dict({name: qat.state_dict()[name] for name in names})


def test_the_quantizers_of_two_layers_in_two_directions() -> None:
    layer = qat_layer("lstm projected", num_layers=2, bidirectional=True)
    ends = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    assert [name for name, _ in layer.named_children()] == [
        "input_quantizer",
        "input_quantizer_l1",
        *(f"hidden_quantizer{end}" for end in ends),
        *(f"projection_quantizer{end}" for end in ends),
        *(f"weight_quantizer_{which}{end}" for end in ends for which in ("ih", "hh", "hr")),
    ]


def test_moving_a_copy_leaves_the_float_layer_where_it_was() -> None:
    layer = float_layer("lstm")
    qat = LSTMQAT.from_float(layer)
    qat.to_float().double()
    assert layer._flat_weights[0] is layer.weight_ih_l0
    assert layer.weight_ih_l0.dtype is torch.float64  # the very same parameters
    layer.weight_ih_l0 = nn.Parameter(torch.zeros_like(layer.weight_ih_l0))
    assert qat._flat_weights[0] is qat.weight_ih_l0 is not layer.weight_ih_l0


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_the_same_and_are_apart(kind: str, way: Any) -> None:
    layer, x = qat_layer(kind, num_layers=2), sequence("padded")
    layer(x)
    layer.eval()
    twin = way(layer)
    assert_same(twin(x), layer(x), 0)
    with torch.no_grad():
        twin.weight_ih_l0.zero_()
    assert bool(layer.weight_ih_l0.abs().sum() > 0)


def test_torch_save_keeps_a_whole_layer(tmp_path: Path) -> None:
    layer, x = qat_layer("gru", bidirectional=True), sequence("packed")
    layer(x)
    torch.save(layer.eval(), tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert_same(loaded(x)[1], layer(x)[1], 0)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_weight_scales_are_per_row_or_per_tensor(granularity: Any) -> None:
    recipe = {"preset": "int8", "weight": {"granularity": granularity}}
    layer = qat_layer("lstm projected", config=recipe)
    rows = {"weight_ih_l0": 4 * HIDDEN, "weight_hh_l0": 4 * HIDDEN, "weight_hr_l0": 2}
    for name, count in rows.items():
        quantizer = getattr(layer, name.replace("weight", "weight_quantizer"))
        numel = quantizer.qparams(getattr(layer, name)).scale.numel()
        assert numel == (count if granularity == "per_channel" else 1)


# What is refused


@pytest.mark.parametrize(
    ("x", "hx", "text"),
    [
        (
            torch.zeros(2, 5, 9),
            None,
            "The input of GRU must be (batch, time, 3), (time, 3) or packed; got the shape "
            "(2, 5, 9)",
        ),
        (torch.zeros(3), None, "got the shape (3,)"),
        (torch.zeros(2, 0, 3), None, "A sequence needs at least one step; got GRU (2, 0, 3)"),
        (
            torch.zeros(2, 5, 3),
            torch.zeros(1, 5, 4),
            "The initial state of GRU must have the shapes [(1, 2, 4)] for an input of "
            "(2, 5, 3); got [(1, 5, 4)]",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x: Tensor, hx: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        qat_layer("gru", batch_first=True)(x, hx)


def test_a_normed_weight_is_left_and_named() -> None:
    model = nn.Sequential(nn.LSTM(3, 4), nn.Identity())
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[0], "weight_hh_l0")  # type: ignore[no-untyped-call]
    model.append(nn.Linear(4, 2))
    (skipped,) = prepare(model, Recipe(joins=False, outputs=False)).skipped
    assert skipped.reason == (
        "its weight_hh_l0 is computed by a hook (weight_norm or spectral_norm)"
    )


# In a model


class Tagger(nn.Module):
    """Linear, relu, a recurrent layer, and a head over all steps; takes (batch, time, 3)."""

    def __init__(self, kind: str = "lstm", batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, FEATURES)
        self.rnn = float_layer(kind, batch_first=batch_first, **options)
        self.skip = nn.Linear(FEATURES, 2)
        width = (self.rnn.proj_size or HIDDEN) * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        output, _ = self.rnn(x)
        return self.head(output) + self.skip(x)


def trained(model: nn.Module, *inputs: Any, recipe: Any = "int8") -> nn.Module:
    prepare(model, recipe, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = pytree.tree_leaves(model.train()(*inputs))
        sum(o.square().mean() for o in outputs).backward()  # type: ignore[union-attr]
        optimizer.step()
    return model.eval()


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
    model, x = Tagger(kind), torch.randn(2, STEPS, FEATURES)
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


# Final numbers and files


def converted(kind: str, recipe: Any = "int8", **options: Any) -> tuple[nn.Module, QuantizedModel]:
    x = torch.randn(4, STEPS, FEATURES)
    model = trained(Tagger(kind, **options), x, recipe=recipe)
    return model, convert(model, x)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_is_the_model(kind: str, options: dict[str, Any]) -> None:
    model, quantized = converted(kind, **options)
    # The batch stays dynamic.
    x = torch.randn(7, STEPS, FEATURES)
    torch.testing.assert_close(quantized(x), model(x))
    rnn: Any = model.rnn
    for name in rnn.weight_names(rnn):
        quantizer = getattr(rnn, name.replace("weight", "weight_quantizer"))
        found = quantized.tensors[f"rnn.{name}"]
        assert found.qparams.equal(quantizer.qparams(getattr(rnn, name)))
    hidden = rnn.hidden_quantizer_l0
    assert quantized.tensors["rnn.hidden_l0"].qparams.equal(hidden.qparams())


def test_each_weight_is_one_node_and_each_step_one_of_the_same_tensor() -> None:
    _, quantized = converted("lstm projected", num_layers=2)
    nodes = quantized.program.graph.nodes
    weights = [call.key for call in map(as_dequantize, nodes) if call is not None]
    assert len(weights) == len(set(weights)) == 6 + 3
    activations = [call.key for call in map(as_fake_quantize, nodes) if call is not None]
    for layer in ("l0", "l1"):
        assert activations.count(f"rnn.hidden_{layer}") == STEPS
        assert activations.count(f"rnn.projection_{layer}") == STEPS
    assert activations.count("rnn.input") == activations.count("rnn.input_l1") == 1


def test_layers_of_a_converted_model_are_its_matmuls() -> None:
    model, quantized = converted("gru")
    rnn: Any = model.rnn
    found = [call for call in quantized.layers if call.name == "rnn"]
    assert [(call.input_key, call.weight_key) for call in found] == [
        ("rnn.input", "rnn.weight_ih_l0"),
        *[("rnn.hidden_l0", "rnn.weight_hh_l0")] * STEPS,
    ]
    assert found[0].bias is not None
    assert torch.equal(found[0].bias, rnn.bias_ih_l0)
    assert all(c.bias is not None and torch.equal(c.bias, rnn.bias_hh_l0) for c in found[1:])


def test_another_length_is_refused_and_the_reason_given() -> None:
    _, quantized = converted("lstm")
    with pytest.raises(ValueError, match=r"size\(\)\[1\] == 5. A recurrent layer's steps are unr"):
        quantized(torch.randn(4, STEPS + 1, FEATURES))


@pytest.mark.parametrize("batch", [1, 3, STEPS])
def test_the_batch_is_dynamic_where_time_comes_first(batch: int) -> None:
    x = torch.randn(STEPS, batch, FEATURES)
    model = trained(Tagger(batch_first=False), x)
    quantized = convert(model, x)
    more = torch.randn(STEPS, 8, FEATURES)
    torch.testing.assert_close(quantized(more), model(more))


class Streaming(nn.Module):
    """Takes and gives the state, as a device that runs step by step does."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, HIDDEN, 2, batch_first=batch_first)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, (h, c) = self.rnn(x, (h, c))
        return output, h, c


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_state_s_batch_is_dynamic_too(batch: int, batch_first: bool, tmp_path: Path) -> None:
    def inputs(size: int) -> tuple[Tensor, ...]:
        x = torch.randn(STEPS, size, FEATURES)
        x = x.transpose(0, 1) if batch_first else x
        return x.contiguous(), torch.randn(2, size, HIDDEN), torch.randn(2, size, HIDDEN)

    model = trained(Streaming(batch_first), *inputs(batch))
    quantized = convert(model, inputs(batch))
    more = inputs(7)
    for found, expected in zip(quantized(*more), model(*more), strict=True):
        torch.testing.assert_close(found, expected)
    agreement = verify(quantized, export(quantized, "fake_quant_onnx", tmp_path / "net"), more)
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1


class Packing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(FEATURES, HIDDEN, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.rnn(packed)[1]


def test_a_packed_sequence_trains_but_is_refused_by_convert() -> None:
    inputs = torch.randn(3, STEPS, FEATURES), torch.tensor([5, 3, 1])
    model = trained(Packing(), *inputs)
    with pytest.raises(CaptureError, match=r"(?s)'rnn' \(GRUQAT\).*must get padded sequences"):
        convert(model, inputs)


class Encoder(nn.Module):
    """A recurrent layer and a head over all steps; takes (batch, time, 3)."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.rnn = float_layer(kind, batch_first=True, **options)
        width = (self.rnn.proj_size or HIDDEN) * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize(
    ("options", "granularity"),
    [({}, "per_tensor"), ({"num_layers": 2, "bidirectional": True}, "per_channel")],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["fake_quant_onnx", "cann"])
def test_files_compute_what_torch_does_at_every_step(
    target: str, kind: str, options: dict[str, Any], granularity: Any, tmp_path: Path
) -> None:
    # Without joins, so that errors of the recurrent layer are not rounded away.
    recipe = Recipe(WeightSpec(granularity=granularity), joins=False, outputs=False)
    x = torch.randn(4, STEPS, FEATURES)
    quantized = convert(trained(Encoder(kind, **options), x, recipe=recipe), x)
    agreement = verify(
        quantized, export(quantized, target, tmp_path / "net"), torch.randn(6, STEPS, FEATURES)
    )
    assert agreement.parameters_equal, agreement
    literal = agreement.runtimes[0]
    # Steps are 1/255 of the output's range; the biases that CANN rounds to its accumulators' grids
    # may move a rounding.
    assert literal.max_steps / 255 <= (1e-4 if target == "fake_quant_onnx" else 0.01), agreement


@pytest.mark.parametrize("recipe", ["w4a8", "w4a4", "amct"])
def test_other_recipes_are_exported_too(recipe: str, tmp_path: Path) -> None:
    x = torch.randn(4, STEPS, FEATURES)
    quantized = convert(trained(Encoder("lstm"), x, recipe=EVERY_LAYER.get(recipe, recipe)), x)
    for target in ("fake_quant_onnx", "cann"):
        agreement = verify(quantized, export(quantized, target, tmp_path / target))
        assert agreement.parameters_equal, agreement


def test_it_can_be_saved_and_loaded(tmp_path: Path) -> None:
    _, quantized = converted("gru", num_layers=2)
    quantized.save(tmp_path / "model.pt2")
    loaded, x = QuantizedModel.load(tmp_path / "model.pt2"), torch.randn(2, STEPS, FEATURES)
    assert torch.equal(loaded(x), quantized(x))
    assert loaded.tensors.keys() == quantized.tensors.keys()


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
    scale = layer.hidden_quantizer_l0.scale
    with torch.no_grad():
        # Some states lie outside.
        scale.mul_(0.7)
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
    torch.testing.assert_close(scale.grad, wide.grad.float(), rtol=1e-4, atol=1e-6)


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
