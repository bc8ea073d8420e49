"""The converted model computes what was trained; the live model stays untouched."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from lightning_qat.convert.convert import convert
from lightning_qat.convert.finalize import finalized_copy
from lightning_qat.ir.exported_program import Constants
from lightning_qat.ir.ops import DEQUANTIZE, FAKE_QUANTIZE
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec
from tests.convert.cases import one_step, operators, same, snapshot
from tests.models import (
    EVERY_LAYER,
    INPUTS_ONLY,
    NETWORKS,
    ResidualAdd,
    conv_bn_relu,
    inputs_for,
    linear,
    trained,
)

# The batch norm of these networks is folded, which is another order of float32 operations.
FOLDED = {"conv_bn_relu", "depthwise", "residual_add"}


# Equality with the model that was trained


@pytest.mark.parametrize("recipe", ["int8", "w4a8", "w4a4", "a16w8", "amct"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*integers of the folded weight saturate:UserWarning")
def test_the_converted_model_computes_what_the_trained_one_does(network: str, recipe: str) -> None:
    x = inputs_for(network)
    model = trained(NETWORKS[network][0](), x, EVERY_LAYER.get(recipe, recipe))
    quantized = convert(model, x)
    with torch.no_grad():
        expected = model(x)
    if network not in FOLDED:
        assert torch.equal(quantized(x), expected)
    elif recipe != "amct":
        difference = (quantized(x) - expected).abs()
        # Float32 rounding of values below 10, but for a value here and there that lies within that
        # of a rounding point of the quantizer behind the batch norm and takes the other side.
        assert (difference > 1e-5).float().mean() < 0.1
        assert difference.max() <= one_step(model)


def test_integers_and_scales_are_the_quantizers_own() -> None:
    x = inputs_for("linear")
    model = trained(linear(), x, INPUTS_ONLY)
    tensors = convert(model, x).tensors
    assert set(tensors) == {"0.input", "0.weight", "2.input", "2.weight"}
    for name in "02":
        layer = model.get_submodule(name)
        assert tensors[f"{name}.input"].qparams.equal(layer.input_quantizer.qparams())
        weight = tensors[f"{name}.weight"]
        assert weight.qparams.equal(layer.weight_quantizer.qparams(layer.weight))
        assert weight.integers is not None
        real = weight.integers.float() * weight.qparams.scale[:, None]
        assert torch.equal(real, layer.weight_quantizer(layer.weight))
        assert (weight.kind, tensors[f"{name}.input"].kind) == ("weight", "activation")


def test_every_quantized_tensor_is_one_explicit_node_with_constants() -> None:
    x = inputs_for("conv_bn_relu")
    quantized = convert(trained(conv_bn_relu(), x, INPUTS_ONLY), x)
    found = operators(quantized)
    assert found.count("fake_quantize") == 2
    assert found.count("dequantize") == 2
    assert found.count("conv2d") == 2
    assert "batch_norm" not in found
    constants = Constants(quantized.program)
    for node in quantized.program.graph.nodes:
        if node.target is FAKE_QUANTIZE:
            assert constants.value(node.args[1]) is not None
        if node.target is DEQUANTIZE:
            integers = constants.value(node.args[0])
            assert integers is not None
            assert integers.dtype is torch.int8


def test_no_float_weight_of_a_quantized_layer_is_kept() -> None:
    x = inputs_for("conv_bn_relu")
    quantized = convert(trained(conv_bn_relu(), x), x)
    values = {**quantized.program.state_dict, **quantized.program.constants}
    assert not [n for n, v in values.items() if v.dim() > 1 and v.is_floating_point()]
    assert not [n for n in values if "running_" in n]


# The live model


def test_the_live_model_is_untouched_and_goes_on_training() -> None:
    x = inputs_for("residual_add")
    model = trained(ResidualAdd(), x).train()
    model(x).sum().backward()
    before, modes = snapshot(model), [m.training for m in model.modules()]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    convert(model, x)
    assert same(snapshot(model), before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    now = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, now, strict=True))
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    model(x).sum().backward()
    assert not torch.equal(next(model.parameters()).grad, gradients[0])  # type: ignore[arg-type]


def test_training_on_does_not_change_what_was_converted() -> None:
    x = inputs_for("linear")
    model = trained(linear(), x)
    quantized = convert(model, x)
    before = quantized(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.train()(x * 10)
    assert torch.equal(quantized(x), before)


def test_gradients_are_neither_needed_nor_kept() -> None:
    x = inputs_for("linear").requires_grad_()
    quantized = convert(trained(linear(), x), x)
    assert not quantized(x).requires_grad


def test_a_model_beside_a_weight_norm_hook_converts_after_a_training_step() -> None:
    # The hook leaves a weight with a graph on the module, which deepcopy refuses.
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    prepare(model)
    model(x).sum().backward()
    model.eval()
    assert torch.equal(convert(model, x)(x), model(x))


def test_a_weight_that_another_module_reads_is_still_there() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.fc.weight.abs().mean()

    model, x = Reader(), torch.randn(3, 4)
    trained(model, x)
    assert torch.equal(convert(model, x)(x), model(x))


def test_a_layer_called_twice_keeps_one_set_of_numbers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.fc(x)))

    model, x = Twice(), torch.randn(4, 3)
    trained(model, x)
    quantized = convert(model, x)
    assert list(quantized.tensors) == ["fc.input", "fc.weight", "fc.output_0_1"]
    assert operators(quantized).count("fake_quantize") == 3
    assert torch.equal(quantized(x), model(x))


# Errors


def test_a_model_without_qat_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no QAT layers, so there is nothing to"):
        convert(linear(), inputs_for("linear"))


def test_layers_without_a_range_and_broken_weights_are_all_named() -> None:
    model = ResidualAdd()
    prepare(model, INPUTS_ONLY)
    model.conv1(inputs_for("residual_add"))
    with torch.no_grad():
        model.conv1.weight[0] = float("nan")
    with pytest.raises(
        ValueError,
        match=r"conv2: no training batch has passed through it; head: no training batch has passed "
        r"through it; conv1: its weight is not finite\. Train for at least one batch",
    ):
        convert(model, inputs_for("residual_add"))


@pytest.mark.parametrize(
    "calibration", ["moving_average", "minmax", "percentile", "mse", "entropy", "histogram"]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_layer_that_saw_a_value_that_is_not_finite_is_named(calibration: Any, bad: float) -> None:
    # In a loop that never calls commit_ranges, so that nothing waits for the device in training.
    model = ResidualAdd()
    activation = ActivationSpec(calibration=calibration)
    prepare(model, Recipe(activation=activation, joins=False, outputs=False))
    x = inputs_for("residual_add")
    model(x)
    broken = torch.randn(2, 4)
    broken[0, 1] = bad
    model.head(broken)
    model(x)
    with pytest.raises(
        ValueError,
        match=r"finite\. head: its range is not finite: NaN or infinity came in, or training has",
    ):
        convert(model, x)


def test_learned_numbers_that_diverged_are_named() -> None:
    model, x = ResidualAdd(), inputs_for("residual_add")
    recipe = {
        "weight": {"quantizer": "learned"},
        "activation": {"quantizer": "learned"},
        "joins": False,
        "outputs": False,
    }
    prepare(model, recipe)
    model(x)
    with torch.no_grad():
        model.conv1.weight_quantizer.half_width[0] = float("nan")
        model.head.input_quantizer.half_width.fill_(float("inf"))
    with pytest.raises(
        ValueError, match=r"head: its range is not finite.*conv1: the learned scale"
    ):
        convert(model, x)


def test_a_finalized_copy_is_on_the_cpu_in_eval_mode_with_the_model_s_outputs() -> None:
    x = inputs_for("linear")
    model = trained(linear(), x).train()
    final = finalized_copy(model, (x,), {})
    assert not any(m.training for m in final.modules())
    assert torch.equal(final(x), model.eval()(x))
