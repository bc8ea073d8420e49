"""LSTMQAT and GRUQAT against torch's layers and a written-out loop."""

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

from lightning_qat import Recipe, prepare
from lightning_qat.layers import LSTMQAT
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.training.range_sync import commit_ranges
from tests.layers.recurrent_cases import (
    BATCH,
    FEATURES,
    HIDDEN,
    KINDS,
    STEPS,
    assert_same,
    float_layer,
    initial_state,
    qat_layer,
    sequence,
)

# torch's own remark on its float LSTM.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def without_quantization(layer: Any) -> Any:
    for name, quantizer in list(layer.named_children()):
        if isinstance(quantizer, WeightQuantizer):
            setattr(layer, name, nn.Identity())
        else:
            quantizer.quantizing = False
    return layer


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
