"""Which tensors one forward finds, and which of them share a quantizer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.function_hooks.hooks import hooks_of
from lightning_qat.ir.ops import as_fake_quantize
from lightning_qat.joins.apply import plan_of
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from tests.join_networks import NETWORKS, BasicBlock, ResNet, inputs_for, train_steps
from tests.joins.cases import calibrated, converted, serving, the_plan

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
    model = ResNet()
    prepare(model, "int8", inputs_for("resnet8"))
    plain = model.blocks[1]
    assert serving(model, "blocks.1", "add", 1) is plain.conv1.input_quantizer
    assert serving(model, "blocks.1", "add", 0) is not plain.conv1.input_quantizer
    widening = model.blocks[2]
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


# What the recipe turns off


def test_outputs_stay_float_where_the_recipe_says_so() -> None:
    x = inputs_for("resnet8")
    model = ResNet()
    report = prepare(model, Recipe(outputs=False), x)
    assert report.joins is not None
    assert not [c for t in report.joins.tensors for c in t.consumers if "output:" in c]
    quantized = convert(train_steps(model, x), x)
    assert quantized.output_steps == {}
    with torch.no_grad():
        torch.testing.assert_close(model(x), quantized(x), rtol=0, atol=0.05)
        assert model(x).unique().numel() > 30


def test_without_joins_only_layers_and_outputs_are_quantized() -> None:
    x = inputs_for("resnet8")
    model = ResNet()
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
    x = inputs_for("resnet8")
    model = ResNet()
    assert prepare(model, "amct", x).joins is None
    train_steps(model, x)
    assert plan_of(model) is None
    watching = [i for i in map(hooks_of, model.modules()) if i is not None]
    assert not any(i.plan.sites for i in watching)
    layers = [n for n, m in model.named_modules() if hasattr(m, "weight_quantizer")]
    assert len({id(model.get_submodule(n).input_quantizer) for n in layers}) == len(layers)


class Unlisted(nn.Module):
    """Functions that no integer target has, between those that some have."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6), nn.Softsign()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.fc(x)).float()
        y = torch.where(y > 0, y, torch.zeros_like(y)) / y.shape[-1]
        y.mul_(2.0)
        return F.relu6(y + x)


def test_functions_without_an_integer_form_are_listed_once_each() -> None:
    report = prepare(Unlisted(), "int8", torch.randn(4, 6))
    assert report.joins is not None
    assert report.joins.left_float == (
        "act.softsign: no integer form is known",
        "where: no integer form is known",
        "div: by a number, in float unless a layer in front of it takes the factor",
        "mul: by a number, in float unless a layer in front of it takes the factor",
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
