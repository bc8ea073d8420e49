"""prepare swaps classes in place and changes nothing else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.layers import Conv2dQAT, LinearQAT
from lightning_qat.model.paths import ModelPaths
from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.prepare_like import prepare_like
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.prepare.swap import choose_layers, is_layer
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec
from tests.models import NETWORKS, ResidualAdd, conv_bn_relu, inputs_for, linear, trained
from tests.prepare.cases import Aliased, OwnLinear, quantizers, types

# What changes


def test_layers_become_qat_layers_and_every_other_module_stays() -> None:
    model = ResidualAdd()
    before, objects = types(model), dict(model.named_modules())
    report = prepare(model)
    assert [layer.name for layer in report.swapped] == ["conv1", "conv2", "head"]
    assert [layer.kind for layer in report.swapped] == ["Conv2d", "Conv2d", "Linear"]
    assert report.skipped == ()
    after = types(model)
    changed = {"conv1": Conv2dQAT, "conv2": Conv2dQAT, "head": LinearQAT}
    added = {
        f"{layer}.{name}": kind
        for layer in changed
        for name, kind in (
            ("input_quantizer", ActivationQuantizer),
            ("weight_quantizer", WeightQuantizer),
        )
    }
    assert after == {**before, **changed, **added}
    now = dict(model.named_modules())
    assert all(now[name] is module for name, module in objects.items())


def test_parameters_buffers_and_their_names_stay() -> None:
    model = conv_bn_relu()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert all(dict(model.named_buffers())[name] is value for name, value in buffers.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays_and_reaches_the_quantizers(training: bool) -> None:
    model = conv_bn_relu().train(training)
    prepare(model)
    assert {module.training for module in model.modules()} == {training}


def test_before_any_batch_the_activations_pass_through() -> None:
    model, x = linear().eval(), inputs_for("linear")
    prepare(model)
    layers = [model[0], model[2]]
    quantized = [layer.weight_quantizer(layer.weight) for layer in layers]
    expected = F.linear(
        F.relu(F.linear(x, quantized[0], layers[0].bias)), quantized[1], layers[1].bias
    )
    assert torch.equal(model(x), expected)


def test_hooks_go_on_firing() -> None:
    model = linear()
    calls: list[str] = []
    model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[0].register_forward_hook(lambda *_: calls.append("post"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    prepare(model)
    model(inputs_for("linear").requires_grad_()).sum().backward()
    # The forward that makes the plan runs once more, in eval mode.
    assert calls == ["pre", "post"] * 2 + ["backward"]
    calls.clear()
    model(inputs_for("linear").requires_grad_()).sum().backward()
    assert calls == ["pre", "post", "backward"]


def test_an_optimizer_made_before_goes_on_training() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(inputs_for("linear")).sum().backward()
    optimizer.step()
    prepare(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.zero_grad()
    model(inputs_for("linear")).sum().backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert len(list(model.parameters())) == len(optimizer.param_groups[0]["params"])


def test_an_alias_stays_an_alias_and_is_reported_once() -> None:
    model = Aliased()
    report = prepare(model)
    assert model.again is model.first
    assert type(model.again) is LinearQAT
    assert [(s.name, s.aliases) for s in report.swapped] == [("first", ("again",)), ("head", ())]
    assert "(also again)" in str(report)


@pytest.mark.parametrize("name", ["first", "again"])
def test_a_pattern_may_name_any_alias(name: str) -> None:
    model = Aliased()
    report = prepare(model, Recipe(exclude=(name,)))
    assert [layer.name for layer in report.swapped] == ["head"]
    assert type(model.first) is nn.Linear
    model = Aliased()
    report = prepare(model, Recipe(include=(name,), overrides={name: {"weight": {"bits": 4}}}))
    assert [(s.name, s.spec.weight.bits) for s in report.swapped] == [("first", 4)]


def test_the_root_itself_can_be_the_layer() -> None:
    model = nn.Linear(3, 2)
    report = prepare(model)
    assert type(model) is LinearQAT
    assert [layer.name for layer in report.swapped] == [""]


def test_every_layer_gets_the_specs_of_the_recipe() -> None:
    model = ResidualAdd()
    prepare(
        model,
        {
            "weight": {"bits": 4},
            "overrides": {"type:Linear": {"activation": {"bits": 6}}, "conv2": None},
        },
    )
    assert type(model.conv2) is nn.Conv2d
    assert model.conv1.weight_quantizer.spec == WeightSpec(bits=4)
    assert model.conv1.input_quantizer.spec == ActivationSpec()
    assert model.head.input_quantizer.spec == ActivationSpec(bits=6)


class CalledInAnotherOrder(nn.Module):
    """The last layer is registered first, and one layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.middle, self.stem = (nn.Linear(3, 3) for _ in range(3))
        self.encoder = nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0, batch_first=True)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.middle(self.stem(x))))


def bits_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        layer.name: (layer.spec.weight.bits, layer.spec.activation.bits)
        for layer in prepare_like(copy.deepcopy(FLOAT[type(model)]), model.state_dict()).swapped
    }


FLOAT = {CalledInAnotherOrder: CalledInAnotherOrder()}


@pytest.mark.parametrize(
    ("example", "ends"),
    [(torch.ones(1, 2, 3), {"stem", "head"}), (None, {"head", "unused"})],
    ids=["run", "registration"],
)
def test_the_first_and_the_last_layer_have_8_bits_in_presets_of_few(
    example: Tensor | None, ends: set[str]
) -> None:
    model = CalledInAnotherOrder()
    before = [module.training for module in model.modules()]
    report = prepare(model, "w4a8", example)
    bits = {s.name: (s.spec.weight.bits, s.spec.activation.bits) for s in report.swapped}
    assert {name for name, pair in bits.items() if pair == (8, 8)} == ends
    assert set(bits.values()) == {(8, 8), (4, 8)}
    assert bits_of(model) == bits
    assert [m.training for m in model.modules() if not isinstance(m, Quantizer)][: len(before)]


@pytest.mark.parametrize("network", ["linear", "conv_bn_relu", "residual_add"])
def test_the_outputs_of_presets_of_few_bits_have_8(network: str) -> None:
    model = NETWORKS[network][0]()
    plan = prepare(model, "w4a4", inputs_for(network)).joins
    assert plan is not None
    outputs = {t.spec.bits for t in plan.tensors if any("output" in c for c in t.consumers)}
    assert outputs == {8}


def test_the_last_of_a_transformer_s_own_layers_is_found() -> None:
    # In eval mode without gradient torch calls none of its layers, unless they have hooks.
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    report = prepare(model, "w4a4", torch.ones(1, 2, 4))
    bits = {s.name: s.spec.weight.bits for s in report.swapped}
    assert bits["1.linear2"] == 8
    assert bits["1.linear1"] == 4


def test_prepare_again_leaves_qat_layers_alone_and_may_add_others() -> None:
    model = linear()
    first = prepare(model, Recipe(include=("0",)))
    quantizer = model[0].input_quantizer
    second = prepare(model, Recipe(weight=WeightSpec(bits=4), first_last=8))
    assert model[0].input_quantizer is quantizer
    assert model[0].weight_quantizer.spec.bits == 8
    assert [(s.name, s.reason) for s in second.skipped] == [("0", "already quantized")]
    assert [s.name for s in second.swapped] == ["2"]
    both = second.after(first)
    assert [s.name for s in both.swapped] == ["0", "2"]
    assert both.skipped == ()


def test_prepare_of_an_entirely_quantized_model_is_no_error() -> None:
    model = linear()
    prepare(model)
    assert prepare(model).swapped == ()


def test_a_float_checkpoint_loads_into_the_prepared_model_and_its_weights_back() -> None:
    source, model = conv_bn_relu(), conv_bn_relu()
    prepare(model)
    model.load_state_dict(source.state_dict())
    assert torch.equal(model[0].weight, source[0].weight)
    fresh = conv_bn_relu()
    result = fresh.load_state_dict(model.state_dict(), strict=False)
    assert result.missing_keys == []
    assert all("_quantizer." in key for key in result.unexpected_keys)


def test_a_prepared_model_can_be_copied_and_loaded() -> None:
    model = trained(linear(), inputs_for("linear"))
    x = inputs_for("linear")
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    other = linear()
    prepare(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model(x))


def test_plan_changes_nothing() -> None:
    model = ResidualAdd()
    before = types(model)
    assert len(choose_layers(ModelPaths.of(model), Recipe()).swapped) == 3
    assert types(model) == before


def test_quantizers_are_named_by_layer() -> None:
    model = linear()
    prepare(model)
    names = ["input_quantizer", "weight_quantizer"]
    assert list(quantizers(model)) == [f"{layer}.{name}" for layer in "02" for name in names]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_prepared_network_trains(network: str) -> None:
    model = NETWORKS[network][0]()
    prepare(model)
    model(inputs_for(network)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(
        q.calibrated for q in quantizers(model).values() if isinstance(q, ActivationQuantizer)
    )


def test_every_layer_is_accounted_for() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(2, 2), OwnLinear(2, 2), nn.ReLU())
    report = prepare(model)
    names = {s.name for s in (*report.swapped, *report.skipped)}
    assert names == {name for name, module in model.named_modules() if is_layer(module)}


def test_the_report_prints_a_line_per_layer() -> None:
    assert str(prepare(linear(), Recipe(exclude=("0",)))).splitlines() == [
        "1 layers quantized, 1 left as they are",
        "  2  Linear: weight 8 bits per_channel minmax, input 8 bits affine",
        "  0  Linear: left as it is, excluded by the recipe (exclude: '0')",
    ]


def test_the_reports_of_an_empty_model_are_empty() -> None:
    assert str(PrepareReport((), ())) == "0 layers quantized, 0 left as they are"


def test_an_encoder_layer_s_fast_path_does_not_go_around_the_quantizers() -> None:
    # In eval mode without gradient nn.TransformerEncoderLayer hands its layers' weights to one
    # fused float kernel and calls none of them.
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    trained(encoder, x)
    slow = encoder(x).detach()
    with torch.no_grad():
        fast = encoder(x)
    # Attention is summed in another order: float32 rounding, far below a step of 0.01.
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(first_last=8)])
def test_the_paths_of_a_model_are_read_before_and_after_the_swap_only(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[nn.Module] = []
    of = ModelPaths.of
    monkeypatch.setattr(ModelPaths, "of", lambda model: read.append(model) or of(model))
    prepare(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), recipe, torch.ones(2, 4))
    assert len(read) == 2
