"""Every tensor is quantized once: what is planned, what the live model does, what is exported."""

import copy
import functools
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from lightning_qat.checkpoint.load import load_qat_checkpoint
from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import as_arrays
from lightning_qat.export.verify import verify
from lightning_qat.function_hooks.hooks import hooks_of
from lightning_qat.ir.exported_program import Constants
from lightning_qat.ir.ops import as_fake_quantize
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.joins.apply import plan_of
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.prepare.prepare import prepare
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.recipe.recipe import Recipe
from tests.join_networks import CNNS, NETWORKS, BasicBlock, ResNet20, inputs_for, train_steps


@functools.cache
def converted(network: str) -> QuantizedModel:
    """A network after three real training steps, the same one for every test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = inputs_for(network, 8)
        model = NETWORKS[network][0]()
        prepare(model, "int8", x)
        return convert(train_steps(model, x), x)


def calibrated(model: nn.Module, *inputs: Any, recipe: Recipe | str = "int8") -> nn.Module:
    """Prepare a model and show it two batches, of which the first one makes the plan."""
    prepare(model, recipe)
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(*inputs)
    return model.eval()


def the_plan(model: nn.Module) -> JoinPlan:
    plan = plan_of(model)
    assert plan is not None
    return plan


def serving(model: nn.Module, path: str, function: str, operand: int = 0, call: int = 0) -> Any:
    """The quantizer of one operand of one call."""
    place = f"{path}.{function}:{call}[{operand}]".lstrip(".")
    [tensor] = [t for t in the_plan(model).tensors if place in t.consumers]
    return model.get_submodule(tensor.quantizer)


def steps_apart(
    model: QuantizedModel, target: str, runtime: str, x: Tensor, folder: Path
) -> np.ndarray[Any, Any]:
    """How far every element of every output of a file is from torch's, in output steps."""
    artifact, exporter = export(model, target, folder / "net"), load_exporter(target)
    assert verify(model, artifact, exporter=exporter).parameters_equal
    reference = as_arrays(model.flat_outputs(model(x)))
    found = exporter.run(artifact, runtime, as_arrays(model.flat_inputs((x,), {})))  # type: ignore[attr-defined]
    assert model.output_steps.keys() == reference.keys()
    return np.concatenate(
        [
            (np.abs(reference[name] - found[name]) / model.output_steps[name]).ravel()
            for name in reference
        ]
    )


# The networks of the issue


@pytest.mark.parametrize("network", NETWORKS)
def test_the_plan_is_the_same_from_example_inputs_and_from_the_first_batch(network: str) -> None:
    x = inputs_for(network)
    one, other = NETWORKS[network][0](), NETWORKS[network][0]()
    report = prepare(one, "int8", x)
    assert prepare(other, "int8").joins is None
    assert plan_of(other) is None
    train_steps(other, x, steps=1)
    assert report.joins is not None
    assert report.joins == plan_of(one)
    assert the_plan(other).to_dict() == report.joins.to_dict()


@pytest.mark.parametrize("network", NETWORKS)
def test_no_call_between_the_layers_is_left_float(network: str) -> None:
    model = NETWORKS[network][0]()
    report = prepare(model, "int8", inputs_for(network))
    assert report.joins is not None
    assert report.joins.left_float == ()
    assert report.skipped == ()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_trained_network_converts_to_what_it_computes(network: str) -> None:
    x = inputs_for(network, 8)
    model = NETWORKS[network][0]()
    prepare(model, "int8", x)
    quantized = convert(train_steps(model, x), x)
    assert list(quantized.output_steps) == list(quantized.output_names)
    with torch.no_grad():
        unfusable = (quantized(x) - model(x)).abs() / quantized.output_steps["output"]
    # Batch norm is folded: another order of float32 operations, seldom on the other side of a
    # rounding point.
    assert (unfusable <= 2).float().mean() >= 0.99


# The next two in one worker: one conversion and one translation serve both.
@pytest.mark.xdist_group("files of joins")
@pytest.mark.parametrize("network", NETWORKS)
def test_onnx_runtime_computes_what_torch_does(network: str, tmp_path: Path) -> None:
    x = inputs_for(network, 16)
    runtime = "onnxruntime, no optimizations"
    unfusable = steps_apart(converted(network), "fake_quant_onnx", runtime, x, tmp_path)
    assert np.mean(unfusable <= 2.001) >= 0.99


@pytest.mark.xdist_group("files of joins")
@pytest.mark.parametrize("network", CNNS)
def test_cann_s_deploy_file_computes_what_torch_does(network: str, tmp_path: Path) -> None:
    x = inputs_for(network, 16)
    unfusable = steps_apart(converted(network), "cann", "reference executor", x, tmp_path)
    assert np.mean(unfusable <= 2.001) >= 0.99


# No tensor has two quantizers

PASSING = {
    *("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("max_pool2d", "relu", "relu_", "permute", "transpose", "slice", "select", "pad"),
    *("constant_pad_nd", "cat", "stack", "upsample_nearest2d", "dropout", "expand", "contiguous"),
    *("clone", "detach", "chunk", "split", "getitem"),
}


def operator_of(node: fx.Node) -> str:
    name = getattr(node.target, "_overloadpacket", node.target)
    return str(getattr(name, "__name__", name)).rpartition(".")[2]


def quantized_sources(node: fx.Node) -> set[fx.Node]:
    """The ``fake_quantize`` nodes whose values a node holds."""
    if as_fake_quantize(node) is not None:
        return {node}
    if node.op != "call_function" or operator_of(node) not in PASSING:
        return set()
    operand: Any = node.args[0]
    nodes = operand if isinstance(operand, list | tuple) else [operand]
    return set().union(*(quantized_sources(n) for n in nodes))


def numbers(model: QuantizedModel, node: fx.Node) -> tuple[float, int]:
    call = as_fake_quantize(node)
    assert call is not None
    scale, zero_point = map(Constants(model.program).value, (call.scale, call.zero_point))
    assert scale is not None
    assert zero_point is not None
    return float(scale), int(zero_point)


@pytest.mark.parametrize("network", NETWORKS)
def test_no_quantized_tensor_is_quantized_again_to_other_numbers(network: str) -> None:
    model = converted(network)
    quantizers = [n for n in model.program.graph.nodes if as_fake_quantize(n) is not None]
    assert quantizers
    again = [
        (str(node.args[-1]), str(source.args[-1]))
        for node in quantizers
        for source in quantized_sources(node.args[0])
        if numbers(model, node) != numbers(model, source)
    ]
    assert again == []


@pytest.mark.parametrize("network", NETWORKS)
def test_no_tensor_is_quantized_twice(network: str) -> None:
    graph = converted(network).program.graph
    for node in graph.nodes:
        calls = [user for user in node.users if as_fake_quantize(user) is not None]
        users = [user for user in calls if user.args[0] is node]
        assert len({user.args[-1] for user in users}) <= 1
        # One node, however many consumers.
        assert len(users) <= 1


@pytest.mark.parametrize("network", NETWORKS)
def test_no_quantizer_stands_right_behind_another(network: str) -> None:
    found = [n for n in converted(network).program.graph.nodes if as_fake_quantize(n) is not None]
    assert [n.args[-1] for n in found if as_fake_quantize(n.args[0]) is not None] == []


# One tensor, one quantizer


def test_the_skip_connection_shares_the_quantizer_of_the_block_s_first_convolution() -> None:
    model = ResNet20()
    prepare(model, "int8", inputs_for("resnet20"))
    plain = model.blocks[1]
    assert serving(model, "blocks.1", "add", 1) is plain.conv1.input_quantizer
    assert serving(model, "blocks.1", "add", 0) is not plain.conv1.input_quantizer
    widening = model.blocks[3]
    assert widening.downsample[0].input_quantizer is widening.conv1.input_quantizer


def test_a_block_computes_what_its_quantizers_called_by_hand_compute() -> None:
    block, x = BasicBlock(4, 4, 1), torch.randn(4, 4, 6, 6)
    calibrated(block, x)
    q = block.conv1.input_quantizer(x)
    y = F.relu(block.bn1(block.conv1(x)))
    y = serving(block, "", "add", 0)(block.bn2(block.conv2(y))) + q
    # The second run of the one relu.
    quantizer = serving(block, "relu", "output", 1)
    assert torch.equal(block(x), quantizer(F.relu(y)))


def test_queries_keys_and_values_share_one_quantizer() -> None:
    model = NETWORKS["encoder_block"][0]()
    prepare(model, "int8", inputs_for("encoder_block"))
    assert model.q.input_quantizer is model.k.input_quantizer is model.v.input_quantizer
    operands = [serving(model, "", "scaled_dot_product_attention", i) for i in range(3)]
    assert len({id(q) for q in operands}) == 3


class AddsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y += x
        return self.two(y)


def test_a_tensor_that_was_added_to_in_place_is_another_tensor() -> None:
    x = torch.randn(16, 4)
    model = calibrated(AddsInPlace(), x)
    left, right = serving(model, "", "add", 0), serving(model, "", "add", 1)
    assert right is model.one.input_quantizer
    assert len({id(q) for q in (left, right, model.two.input_quantizer)}) == 3
    with torch.no_grad():
        y = left(model.one(x)) + right(x)
        expected = serving(model, "two", "output")(model.two(y))
        before = x.clone()
        assert torch.equal(model(x), expected)
    assert torch.equal(x, before)
    # The quantizer behind the sum has seen the sum, not what was there before.
    seen = model.two.input_quantizer
    assert float(seen.max_val) == pytest.approx(float(y.max()), abs=0.1)
    assert float(seen.min_val) == pytest.approx(float(y.min()), abs=0.1)


class ReluInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(x)
        left = self.two(y)
        F.relu_(y)
        return left, self.three(y)


def test_relu_in_place_between_two_consumers_hands_the_grid_on() -> None:
    x = torch.randn(16, 4)
    model = calibrated(ReluInPlace(), x, recipe=Recipe(outputs=False))
    assert model.three.input_quantizer is model.two.input_quantizer
    with torch.no_grad():
        y = model.two.input_quantizer(model.one(x))
        left, right = model(x)
        assert torch.equal(left, model.two(y))
        assert torch.equal(right, model.three(F.relu(y)))


class InPlaceOnASharedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.one(x)
        changed = kept
        changed += x
        return self.two(kept), changed


def test_every_name_of_a_tensor_sees_what_an_in_place_operation_did() -> None:
    x = torch.randn(16, 4)
    model = calibrated(InPlaceOnASharedInput(), x, recipe=Recipe(outputs=False))
    with torch.no_grad():
        left, changed = model(x)
        y = serving(model, "", "add", 0)(model.one(x)) + model.one.input_quantizer(x)
        assert torch.equal(changed, y)
        assert torch.equal(left, model.two(y))


class Concatenates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)
        with torch.no_grad():
            self.two.weight *= 10

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat((self.one(x), self.two(x)), 1))


def test_the_inputs_of_a_concatenation_are_tied_to_one_range() -> None:
    x = torch.randn(64, 4)
    model = calibrated(Concatenates(), x)
    quantizer = serving(model, "", "cat")
    assert quantizer is model.head.input_quantizer
    [tensor] = [t for t in the_plan(model).tensors if "head" in t.consumers]
    assert tensor.producers == ("one.linear", "two.linear")
    with torch.no_grad():
        widest = model.two(x).max()
    # Two batches of the same data: the range is that of both inputs together.
    assert float(quantizer.max_val) == pytest.approx(float(widest), rel=0.05)


class Behind(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.one, self.two = function, nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function(self.one(x)))


FIXED: dict[str, tuple[Callable[[Tensor], Tensor], float, int]] = {
    "torch.sigmoid": (torch.sigmoid, 1 / 256, -128),
    "Tensor.sigmoid": (Tensor.sigmoid, 1 / 256, -128),
    "nn.Sigmoid": (nn.Sigmoid(), 1 / 256, -128),
    "F.softmax": (functools.partial(F.softmax, dim=-1), 1 / 256, -128),
    "nn.Softmax": (nn.Softmax(-1), 1 / 256, -128),
    "torch.tanh": (torch.tanh, 1 / 128, 0),
    "nn.Tanh": (nn.Tanh(), 1 / 128, 0),
    "F.relu6": (F.relu6, 6 / 255, -128),
    "nn.ReLU6": (nn.ReLU6(), 6 / 255, -128),
    "nn.ReLU6(inplace)": (nn.ReLU6(inplace=True), 6 / 255, -128),
    "nn.Hardtanh": (nn.Hardtanh(0, 4), 4 / 255, -128),
    "clamp": (lambda x: x.clamp(0, 2), 2 / 255, -128),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_function_with_a_range_by_definition_fixes_the_numbers(name: str) -> None:
    function, scale, zero_point = FIXED[name]
    model = calibrated(Behind(function), torch.randn(8, 4))
    found = model.two.input_quantizer.qparams()
    assert float(found.scale) == pytest.approx(scale, rel=1e-6)
    assert int(found.zero_point) == zero_point
    if scale in (1 / 256, 1 / 128):
        assert float(found.scale) == scale


@pytest.mark.parametrize(
    "relu", [F.relu, nn.ReLU(), nn.ReLU(inplace=True), torch.relu, torch.relu_, Tensor.relu]
)
def test_the_range_behind_relu_starts_at_zero(relu: Any) -> None:
    model = calibrated(Behind(relu), torch.randn(8, 4))
    quantizer = model.two.input_quantizer
    assert quantizer.spec.fixed_min is True
    assert int(quantizer.qparams().zero_point) == -128


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool1d(F.relu(x), 1),
        lambda x: F.relu(x).reshape(-1, 6),
        lambda x: F.pad(F.relu(x)[:, 1:], (1, 0)),
        lambda x: F.relu(x).transpose(0, 1).contiguous().permute(1, 0),
        lambda x: F.relu(x).T.T,
        lambda x: F.interpolate(F.relu(x)[:, None, ::2], scale_factor=2.0).flatten(1),
    ],
    ids=["max_pool", "reshape", "pad", "transpose", "T", "interpolate"],
)
def test_what_is_known_of_a_range_passes_through(function: Any) -> None:
    model = calibrated(Behind(function), torch.randn(8, 4))
    assert model.two.input_quantizer.spec.fixed_min is True


@pytest.mark.parametrize(
    "function", [lambda x: F.relu(x) - 1, lambda x: -F.relu(x), lambda x: F.relu(x).neg_()]
)
def test_what_is_known_of_a_range_ends_where_values_change(function: Any) -> None:
    model = calibrated(Behind(function), torch.randn(8, 4))
    assert not model.two.input_quantizer.spec.fixed_min
    assert int(model.two.input_quantizer.qparams().zero_point) > -128


# What the recipe turns off


def test_outputs_stay_float_where_the_recipe_says_so() -> None:
    x = inputs_for("resnet20")
    model = ResNet20()
    report = prepare(model, Recipe(outputs=False), x)
    assert report.joins is not None
    assert not [c for t in report.joins.tensors for c in t.consumers if "output:" in c]
    quantized = convert(train_steps(model, x), x)
    assert quantized.output_steps == {}
    with torch.no_grad():
        torch.testing.assert_close(model(x), quantized(x), rtol=0, atol=0.05)
        assert model(x).unique().numel() > 30


def test_without_joins_only_layers_and_outputs_are_quantized() -> None:
    x = inputs_for("resnet20")
    model = ResNet20()
    report = prepare(model, Recipe(joins=False), x)
    assert report.joins is not None
    for tensor in report.joins.tensors:
        for consumer in tensor.consumers:
            is_layer = consumer in {layer.name for layer in report.swapped}
            assert is_layer or consumer == "fc.output:0[0]"
    calls = [
        c for sites in report.joins.sites.values() for c, operands in sites.items() if operands
    ]
    assert calls == ["output:0"]
    assert any("add" in call and "joins=False" in call for call in report.joins.left_float)


def test_amct_s_placement_has_neither() -> None:
    x = inputs_for("resnet20")
    model = ResNet20()
    assert prepare(model, "amct", x).joins is None
    train_steps(model, x)
    assert plan_of(model) is None
    watching = [i for i in map(hooks_of, model.modules()) if i is not None]
    assert not any(i.plan.sites for i in watching)
    layers = [n for n, m in model.named_modules() if hasattr(m, "weight_quantizer")]
    assert len({id(model.get_submodule(n).input_quantizer) for n in layers}) == len(layers)


# The live model, wherever it runs


def called_quantizers(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    names = {model.get_submodule(t.quantizer): t.quantizer for t in the_plan(model).tensors}
    called: set[str] = set()
    handles = [m.register_forward_hook(lambda m, *_: called.add(names[m])) for m in list(names)]
    run()
    for handle in handles:
        handle.remove()
    return called


@pytest.mark.parametrize("network", ["resnet20", "encoder_block", "dense_block"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_model_computes_the_same_without_gradients(network: str, context: Any) -> None:
    x = inputs_for(network)
    model = calibrated(NETWORKS[network][0](), x)
    expected = model(x).detach()
    with context():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("network", ["resnet20", "encoder_block", "mobilenet_v3_block"])
def test_bf16_autocast_quantizes_the_same_tensors(network: str) -> None:
    x = inputs_for(network)
    model = calibrated(NETWORKS[network][0](), x)
    every = {t.quantizer for t in the_plan(model).tensors}
    expected = model(x).detach()
    found: list[Tensor] = []

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(x))

    assert called_quantizers(model, run) == every
    # bfloat16 has 8 bits of mantissa; a few of those per layer.
    span = float(expected.max() - expected.min())
    assert float((found[0].detach().float() - expected).abs().max()) < 0.15 * span
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    assert {q.min_val.dtype for q in quantizers} == {torch.float32}


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))) + x)


class Unlisted(nn.Module):
    """Functions that no integer target has, between those that some have."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.fc(x)).float()
        y = torch.where(y > 0, y, torch.zeros_like(y)) / y.shape[-1]
        y.mul_(2.0)
        return F.relu6(y + x)


def test_functions_without_an_integer_form_are_listed_once_each() -> None:
    report = prepare(Unlisted(), "int8", torch.randn(4, 6))
    assert report.joins is not None
    assert report.joins.left_float == (
        "act.prelu: no integer form is known",
        "where: no integer form is known",
        "div: no integer form is known",
        "mul: no integer form is known",
    )


def test_what_a_layer_norm_reads_is_quantized_with_the_residual_that_reads_it_too() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.norm = nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.one(x)
            return x + self.two(self.norm(x))

    report = prepare(Residual(), "int8", torch.randn(4, 6))
    assert report.joins is not None
    (shared,) = (t for t in report.joins.tensors if "norm.layer_norm:0[0]" in t.consumers)
    assert shared.consumers == ("norm.layer_norm:0[0]", "add:1[0]")


def test_a_product_with_a_number_on_the_same_line_is_not_taken_for_the_planned_one() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.fc(x) * 0.5) * y

    model = Scaled()
    prepare(model, "int8")
    for _ in range(2):
        model.train()(torch.randn(4, 6), torch.randn(4, 6))
    assert [t.consumers for t in the_plan(model).tensors][1:3] == [("mul:0[0]",), ("mul:0[1]",)]


class Checkpoints(nn.Module):
    def __init__(self, saves_memory: bool) -> None:
        super().__init__()
        self.saves_memory = saves_memory
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.saves_memory else block(x)
        return self.head(x.mean((2, 3)))


def test_activation_checkpointing_changes_neither_ranges_nor_gradients() -> None:
    plain = Checkpoints(False)
    saving = Checkpoints(True)
    saving.load_state_dict(plain.state_dict())
    batches = [torch.randn(4, 2, 6, 6) for _ in range(3)]
    for model in (plain, saving):
        prepare(model, "int8", batches[0])
        model.train()
        for x in batches:
            model.zero_grad()
            model(x).square().mean().backward()
    assert the_plan(plain).to_dict() == the_plan(saving).to_dict()
    for tensor in the_plan(plain).tensors:
        one, other = (m.get_submodule(tensor.quantizer) for m in (plain, saving))
        assert torch.equal(one.max_val, other.max_val), tensor.quantizer
        assert torch.equal(one.min_val, other.min_val), tensor.quantizer
    for (name, one), (_, other) in zip(
        plain.named_parameters(), saving.named_parameters(), strict=True
    ):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad), name


def test_a_plan_made_under_activation_checkpointing_waits_until_backward_is_through() -> None:
    plain, saving = Checkpoints(False), Checkpoints(True)
    saving.load_state_dict(plain.state_dict())
    batches = [torch.randn(4, 2, 6, 6) for _ in range(3)]
    for model in (plain, saving):
        prepare(model, "int8")
        model.train()
        for x in batches:
            model.zero_grad()
            model(x).square().mean().backward()
    assert the_plan(plain).to_dict() == the_plan(saving).to_dict()
    for tensor in the_plan(plain).tensors:
        one, other = (m.get_submodule(tensor.quantizer) for m in (plain, saving))
        assert torch.equal(one.max_val, other.max_val), tensor.quantizer
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_plan_that_waits_is_there_after_one_batch_for_convert_and_checkpoints() -> None:
    model, x = Checkpoints(True), torch.randn(4, 2, 6, 6)
    prepare(model, "int8")
    model.train()(x).square().mean().backward()
    assert plan_of(model) is None
    assert "_qat_plan" in model.state_dict()
    assert the_plan(model).tensors[-1].quantizer in dict(model.named_modules())
    other = Checkpoints(True)
    prepare(other, "int8")
    other.train()(x).square().mean().backward()
    assert convert(other, x).output_steps


def test_activation_checkpointing_in_eval_mode_changes_no_gradient() -> None:
    plain, saving = Checkpoints(False), Checkpoints(True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 2, 6, 6)
    gradients = []
    for model in (plain, saving):
        calibrated(model, x)
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("network", ["mobilenet_v3_block", "encoder_block", "dense_block"])
def test_a_copy_computes_the_same_with_quantizers_of_its_own(network: str, how: str) -> None:
    x = inputs_for(network)
    model = calibrated(NETWORKS[network][0](), x)
    twin = COPIES[how](model)
    expected = model(x).detach()
    assert torch.equal(twin(x), expected)
    assert the_plan(twin).to_dict() == the_plan(model).to_dict()
    every = {t.quantizer for t in the_plan(model).tensors}
    assert called_quantizers(twin, lambda: twin(x)) == every
    assert called_quantizers(model, lambda: twin(x)) == set()
    # Training the copy leaves the original alone.
    twin.train()
    twin(100 * x)
    assert torch.equal(model(x), expected)
    assert convert(twin.eval(), x).tensors.keys() == convert(model, x).tensors.keys()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_before_the_first_batch_is_planned_by_its_own(how: str) -> None:
    x = inputs_for("dense_block")
    model = NETWORKS["dense_block"][0]()
    prepare(model, "int8")
    twin = COPIES[how](model)
    train_steps(twin, x, steps=1)
    assert plan_of(twin) is not None
    assert plan_of(model) is None
    train_steps(model, x, steps=1)
    assert the_plan(twin).to_dict() == the_plan(model).to_dict()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_state_dict_brings_the_plan_to_a_fresh_model(network: str, tmp_path: Path) -> None:
    x = inputs_for(network)
    model = calibrated(NETWORKS[network][0](), x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = NETWORKS[network][0]()
    prepare(fresh, "int8")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert the_plan(fresh).to_dict() == the_plan(model).to_dict()
    assert torch.equal(fresh.eval()(x), model(x))
    assert fresh.state_dict().keys() == model.state_dict().keys()
    # It is done: the next batch in training plans nothing.
    before = the_plan(fresh)
    train_steps(fresh, x, steps=1)
    assert plan_of(fresh) is before


def test_a_plan_of_another_model_is_refused_by_name() -> None:
    model = calibrated(ResNet20(), inputs_for("resnet20"))
    state = model.state_dict()
    other = AddsInPlace()
    prepare(other, "int8")
    with pytest.raises(ValueError, match=r"The plan of quantized tensors names .*blocks\.0"):
        other.load_state_dict(state)


class Trained(pl.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), BasicBlock(width, width, 1))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.net(x), 1).flatten(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_checkpoint_brings_the_plan(tmp_path: Path) -> None:
    x = torch.randn(8, 2, 6, 6)
    module = Trained(width=6)
    prepare(module, "int8")
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(x, batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_qat_checkpoint(Trained, tmp_path / "last.ckpt")
    assert the_plan(loaded).to_dict() == the_plan(module).to_dict()
    add = serving(loaded, "net.1", "add", 1)
    assert add is loaded.net[1].conv1.input_quantizer
    assert torch.equal(loaded.eval()(x), module.eval()(x))


# Another path than the plan knows


class Branches(nn.Module):
    """Takes another path on demand, before the add that every forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.path = "plain"

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        if self.path == "extra add":
            y = y + 100 * x
        elif self.path == "extra mul":
            y = y * x
        elif self.path == "integer add":
            y = y + torch.arange(4)
        elif self.path == "fewer":
            return self.two(y)
        return self.two(y + x)


@pytest.fixture
def branching() -> Branches:
    model = Branches()
    prepare(model, Recipe(outputs=False))
    model.train()
    with torch.no_grad():
        model(torch.randn(32, 4))
    return model.eval()  # type: ignore[return-value]


def test_a_planned_call_that_does_not_happen_is_no_error(branching: Branches) -> None:
    branching.path = "fewer"
    x = torch.randn(8, 4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(branching(x), branching.two(branching.one(x)))


def test_arithmetic_with_integers_in_between_changes_nothing(branching: Branches) -> None:
    branching.path = "integer add"
    x = torch.randn(8, 4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = branching.one(x) + torch.arange(4)
        y = serving(branching, "", "add", 0)(y) + serving(branching, "", "add", 1)(x)
        assert torch.equal(branching(x), branching.two(y))


@pytest.mark.parametrize("path", ["extra mul", "extra add"])
def test_a_call_that_was_not_planned_stays_float_with_one_warning(
    branching: Branches, path: str
) -> None:
    branching.path = path
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            branching(torch.randn(8, 4))
    assert len(caught) == 1
    assert re.search(
        rf"{path.removeprefix('extra ')}.* in .*the model's own forward.* took another path",
        str(caught[0].message),
    )


def test_a_call_on_another_path_is_never_given_a_wrong_quantizer(branching: Branches) -> None:
    branching.path = "extra add"
    x = torch.randn(8, 4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = branching(x)
        y = branching.one(x) + 100 * x
        float_add = branching.two(y + x)
        planned = serving(branching, "", "add", 0)(y) + serving(branching, "", "add", 1)(x)
        # The added call stays float, and so may the one behind it.
        assert torch.equal(found, float_add) or torch.equal(found, branching.two(planned))


class BySign(nn.Module):
    """Control flow on data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y = torch.sigmoid(y) if float(x.sum()) > 0 else y * x
        return self.two(y)


def test_control_flow_on_data_is_planned_as_it_ran_and_warned_of_afterwards() -> None:
    model = BySign()
    prepare(model, "int8", torch.ones(2, 4))
    model.train()
    model(torch.ones(2, 4))
    with pytest.warns(UserWarning, match="(mul|sigmoid).* in .*took another path"):
        model(-torch.ones(2, 4))
    model(-torch.ones(2, 4))


class Swaps(nn.Module):
    """The planned call itself meets something else."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, other: Any) -> Tensor:
        return self.two(self.one(x) + other)


@pytest.mark.parametrize("other", [1, 1.5, torch.ones(4, dtype=torch.int64), torch.tensor(2.0)])
def test_a_planned_call_with_something_else_stays_float(other: Any) -> None:
    model, x = Swaps(), torch.randn(8, 4)
    prepare(model, Recipe(outputs=False), (x, x))
    model.train()
    model(x, x)
    model.eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="add.* in .*took another path"):
        found = model(x, other)
    with torch.no_grad():
        assert torch.equal(found, model.two(model.one(x) + other))
        model(x, other)


# Unusual calls


def test_two_calls_per_step_with_different_shapes() -> None:
    model = NETWORKS["mobilenet_v3_block"][0]()
    prepare(model, "int8", torch.randn(2, 8, 8, 8))
    model.train()
    for _ in range(2):
        left, right = model(torch.randn(4, 8, 8, 8)), model(torch.randn(3, 8, 4, 4))
        (left.mean() - right.mean()).square().backward()
    x = torch.randn(2, 8, 4, 4)
    quantized = convert(model.eval(), x)
    with torch.no_grad():
        unfusable = (quantized(x) - model(x)).abs() / quantized.output_steps["output"]
    assert (unfusable <= 2).float().mean() >= 0.99


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = PlainBlock()
        self.head = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = (self.encoder(x).mean((2, 3)) for x in (left, right))
        return self.head(a - b)


def test_a_module_that_runs_twice_per_forward_is_quantized_in_both_runs() -> None:
    inputs = torch.randn(4, 4, 6, 6), torch.randn(4, 4, 5, 5)
    model = calibrated(Siamese(), *inputs)
    runs: list[int] = []
    add = serving(model, "encoder", "add", 0)
    handle = add.register_forward_hook(lambda *_: runs.append(1))
    found = model(*inputs)
    handle.remove()
    assert len(runs) == 2
    assert torch.equal(convert(model, inputs)(*inputs), found)


class HalfFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = PlainBlock(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features.mean((2, 3)))


def test_a_part_without_gradients_is_planned_and_observed_all_the_same() -> None:
    model, x = HalfFrozen(), torch.randn(4, 4, 6, 6)
    prepare(model, "int8")
    model.train()
    model(x).sum().backward()
    assert model.backbone.one.weight.grad is None
    assert model.head.weight.grad is not None
    assert serving(model, "backbone", "add", 0).calibrated
    assert all(model.get_submodule(t.quantizer).calibrated for t in the_plan(model).tensors)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Record:
    logits: Tensor
    count: int = 1


class Returns(nn.Module):
    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two, self.shape = nn.Linear(4, 4), nn.Linear(4, 2), shape

    def forward(self, x: Tensor) -> Any:
        y = self.one(x)
        return self.shape(F.relu(y), self.two(y))


SHAPES: dict[
    str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]
] = {
    "tuple": (lambda a, b: (a, b), lambda o: (o[0], o[1])),
    "list": (lambda a, b: [a, b], lambda o: (o[0], o[1])),
    "dict": (lambda a, b: {"a": a, "b": b, "n": 3}, lambda o: (o["a"], o["b"])),
    "NamedTuple": (Pair, lambda o: (o.first, o.second)),
    "nested": (lambda a, b: {"x": (a, [None, (b,)])}, lambda o: (o["x"][0], o["x"][1][1][0])),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("planned_by", ["example inputs", "first batch"])
def test_nested_outputs_are_quantized_and_keep_their_form(kind: str, planned_by: str) -> None:
    make, read = SHAPES[kind]
    model, x = Returns(make), torch.randn(64, 4)
    prepare(model, "int8", x if planned_by == "example inputs" else None)
    model.train()
    model(x)
    model.eval()
    output = model(x)
    assert type(output) is type(make(x, x))
    first, second = read(output)
    quantized = convert(model, x)
    assert len(quantized.output_steps) == 2
    assert type(quantized(x)) is type(output)
    for tensor, step in zip((first, second), quantized.output_steps.values(), strict=True):
        on_grid = tensor.detach().double() / step
        assert torch.allclose(on_grid, on_grid.round(), atol=1e-3)
        assert tensor.unique().numel() > 8


@dataclass
class Registered:
    logits: Tensor


torch.export.register_dataclass(Registered)


def test_a_dataclass_that_torch_does_not_know_is_reported() -> None:
    model, x = Returns(lambda a, b: Record(b)), torch.randn(64, 4)
    report = prepare(model, "int8", x)
    assert report.joins is not None
    assert report.joins.left_float == (
        "output: torch does not look into Record; call torch.export.register_dataclass(Record)",
    )


def test_a_registered_dataclass_as_output_is_quantized() -> None:
    model, x = Returns(lambda a, b: Registered(b)), torch.randn(64, 4)
    prepare(model, "int8", x)
    model.train()
    model(x)
    model.eval()
    logits = model(x).logits.detach()
    plan = the_plan(model)
    assert [c for t in plan.tensors for c in t.consumers if "output:" in c]
    step = float(serving(model, "two", "output").qparams().scale)
    assert torch.allclose(logits / step, (logits / step).round(), atol=1e-3)


def test_a_tensor_that_is_returned_twice_and_used_has_one_quantizer() -> None:
    model, x = Returns(lambda a, b: (b, {"again": b})), torch.randn(16, 4)
    calibrated(model, x)
    first, second = model(x)[0], model(x)[1]["again"]
    assert torch.equal(first, second)
    outputs = [t for t in the_plan(model).tensors if any("output:" in c for c in t.consumers)]
    assert len(outputs) == 1


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.one(x) * mask
        y = y + 1
        y = 2 * y
        return self.two(y + index), index + index, mask * mask


def test_integers_booleans_and_numbers_are_no_operands_to_quantize() -> None:
    inputs = torch.randn(8, 4), torch.rand(8, 4) > 0.5, torch.arange(4)
    model = Mixed()
    report = prepare(model, "int8", inputs)
    assert report.joins is not None
    assert [t.consumers for t in report.joins.tensors] == [("one",), ("two",), ("two.output:0[0]",)]
    calibrated(model, *inputs)
    found, doubled, squared = model(*inputs)
    assert (doubled.dtype, squared.dtype) == (torch.int64, torch.bool)
    with torch.no_grad():
        y = 2 * (model.one(inputs[0]) * inputs[1] + 1) + inputs[2]
        assert torch.equal(found, serving(model, "two", "output")(model.two(y)))


@pytest.mark.parametrize("network", ["mobilenet_v3_block", "dense_block", "encoder_block", "unet"])
def test_an_empty_batch_passes_and_leaves_the_ranges_alone(network: str) -> None:
    x = inputs_for(network)
    model = calibrated(NETWORKS[network][0](), x)
    before = {
        n: (float(m.min_val), float(m.max_val))
        for n, m in model.named_modules()
        if isinstance(m, ActivationQuantizer)
    }
    for training in (False, True):
        model.train(training)
        for module in model.modules():
            # Batch norm has no statistics of nothing, quantized or not.
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert model(x[:0]).shape[0] == 0
    after = {
        n: (float(m.min_val), float(m.max_val)) for n, m in model.named_modules() if n in before
    }  # type: ignore[arg-type]
    assert after == before


def test_an_empty_first_batch_plans_what_a_full_one_does() -> None:
    x = inputs_for("encoder_block")
    model, other = NETWORKS["encoder_block"][0](), NETWORKS["encoder_block"][0]()
    for prepared, batches in ((model, (x[:0], x)), (other, (x,))):
        prepare(prepared, "int8")
        prepared.train()
        for batch in batches:
            prepared(batch)
    assert the_plan(model).to_dict() == the_plan(other).to_dict()


# The report


@pytest.mark.parametrize("network", NETWORKS)
def test_the_plan_prints_every_tensor_with_producers_and_consumers(network: str) -> None:
    report = prepare(NETWORKS[network][0](), "int8", inputs_for(network))
    plan = report.joins
    assert plan is not None
    assert str(plan) in str(report)
    lines = str(plan).splitlines()
    assert lines[0] == f"{len(plan.tensors)} tensors quantized, 0 calls left float"
    assert len(lines) == 1 + len(plan.tensors)
    for tensor, line in zip(plan.tensors, lines[1:], strict=True):
        producers, quantizer, consumers = line.split(" -> ")
        assert producers.strip() == ", ".join(tensor.producers)
        assert quantizer.split(" (")[0] == tensor.quantizer
        assert consumers == ", ".join(tensor.consumers)
        assert tensor.producers
        assert tensor.consumers


def test_the_plan_of_a_block_in_words() -> None:
    report = prepare(PlainBlock(), "int8", torch.randn(2, 4, 6, 6))
    assert str(report.joins).splitlines() == [
        "4 tensors quantized, 0 calls left float",
        "  input -> one.input_quantizer (8 bits) -> one, add:0[1]",
        "  relu -> two.input_quantizer (8 bits, from 0) -> two",
        "  two.conv2d -> qat_joins.add_0_0 (8 bits) -> add:0[0]",
        "  relu -> qat_joins.output_0_0 (8 bits, from 0) -> output:0[0]",
    ]


def test_calls_that_stay_float_are_named_with_the_reason() -> None:
    x = inputs_for("resnet20")
    report = prepare(ResNet20(), Recipe(exclude=("blocks.1.*", "blocks.1")), x)
    assert report.joins is not None
    left = [line for line in report.joins.left_float if "blocks.1" in line]
    assert left
    assert all("not selected by the recipe" in line for line in left)
    assert f"  left float: {left[0]}" in str(report.joins).splitlines()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_plan_survives_as_primitives(network: str) -> None:
    plan = prepare(NETWORKS[network][0](), "int8", inputs_for(network)).joins
    assert plan is not None
    again = JoinPlan.from_dict(plan.to_dict())
    assert again == plan
    assert again.to_dict() == plan.to_dict()
    assert str(again) == str(plan)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_flow_chart_has_a_node_per_tensor(network: str) -> None:
    plan = prepare(NETWORKS[network][0](), "int8", inputs_for(network)).joins
    assert plan is not None
    lines = plan.mermaid().splitlines()
    assert lines[0] == "flowchart TD"
    for number, tensor in enumerate(plan.tensors):
        assert f"  q{number}([" in "\n".join(lines)
        arrows = [line for line in lines if line.startswith(f"  q{number} --> ")]
        assert len(arrows) == len(tensor.consumers)
        assert [line for line in lines if line.endswith(f"--> q{number}")]
        assert sum(f'"{tensor.quantizer}<br/>' in line for line in lines) == 1
