"""From a trained model to final numbers in one graph; the live model is never touched."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportGraphSignature
from torch.nn.utils import weight_norm

from lightning_qat.convert.capture import CaptureError
from lightning_qat.convert.convert import check_capture, convert
from lightning_qat.convert.finalize import finalized_copy
from lightning_qat.ir.exported_program import Constants
from lightning_qat.ir.ops import DEQUANTIZE, FAKE_QUANTIZE
from lightning_qat.ir.quantized_model import QuantizedModel, QuantizedTensor
from lightning_qat.layers import QATLayer
from lightning_qat.model.inputs import as_call
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec
from tests.models import (
    EVERY_LAYER,
    INPUTS_ONLY,
    NETWORKS,
    Nested,
    ResidualAdd,
    conv_bn_relu,
    inputs_for,
    linear,
    trained,
)

# The batch norm of these networks is folded, which is another order of float32 operations.
FOLDED = {"conv_bn_relu", "depthwise", "residual_add"}


def one_step(model: nn.Module) -> float:
    """What one flipped rounding in the input of every layer can move the output by.

    One step times the layer's largest weight, summed over the layers, and twice that for what
    later layers of these networks make of it.
    """
    layers = [m for m in model.modules() if isinstance(m, QATLayer)]
    steps = [layer.input_quantizer.qparams().scale for layer in layers]  # type: ignore[union-attr]
    weights = [layer.weight.detach().abs().max() for layer in layers]
    return 2 * sum(float(s * w) for s, w in zip(steps, weights, strict=True))


def operators(quantized: QuantizedModel) -> list[str]:
    nodes = quantized.program.graph.nodes
    return [str(n.target).split(".")[-2] for n in nodes if n.op == "call_function"]


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        k: v.clone() if isinstance(v, Tensor) else dict(v) for k, v in model.state_dict().items()
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items()
    )


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


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


def test_a_folded_model_differs_by_rounding_only_where_nothing_is_quantized_behind_it() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), torch.randn(8, 2, 6, 6)
    trained(model, x)
    quantized = convert(model, x)
    assert "batch_norm" not in operators(quantized)
    with torch.no_grad():
        # 18 products in float32, scaled before or after the sum; the largest output is below 8.
        torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=8 * 2.0**-23 * 6)


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


# Inputs and outputs


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_batch_dimension_is_dynamic_whatever_the_example(network: str, samples: int) -> None:
    model = trained(NETWORKS[network][0](), inputs_for(network))
    quantized = convert(model, inputs_for(network, samples))
    for size in (1, 2, 3, 7):
        x = inputs_for(network, size)
        assert quantized(x).shape == model(x).shape


def test_a_model_that_needs_its_batch_size_keeps_it() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.reshape(4, 3))

    model, x = Fixed(), torch.randn(4, 3)
    trained(model, x)
    assert torch.equal(convert(model, x)(x), model(x))
    one = torch.randn(1, 12)
    assert torch.equal(convert(model, one)(one), model(one))


def nested_inputs(samples: int = 4) -> dict[str, Tensor]:
    return {"left": torch.randn(samples, 6), "right": torch.randn(samples, 6) * 5}


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_keyword_inputs_and_nested_outputs_keep_their_names(order: tuple[str, str]) -> None:
    values = nested_inputs()
    model = trained(Nested(), values)
    quantized = convert(model, {name: values[name] for name in order})
    assert set(quantized.input_names) == {"left", "right"}
    assert quantized.output_names == ("logits", "boxes_0", "boxes_1")
    found, expected = quantized(**values), model(**values)
    assert found.keys() == expected.keys()
    assert isinstance(found["boxes"], tuple)
    for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(quantized.flat_outputs(found)["boxes_1"], expected["boxes"][1])


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_flat_inputs_go_by_name_whatever_the_order_of_the_keywords(order: tuple[str, str]) -> None:
    values = nested_inputs()
    quantized = convert(trained(Nested(), values), values)
    flat = quantized.flat_inputs((), {name: values[name] for name in order})
    assert torch.equal(flat["left"], values["left"])
    assert torch.equal(flat["right"], values["right"])


def test_positional_inputs_are_named_by_the_forward_s_arguments() -> None:
    values = tuple(nested_inputs().values())
    quantized = convert(trained(Nested(), values), values)
    assert quantized.input_names == ("left", "right")


def test_an_optional_input_may_be_none() -> None:
    values = {**nested_inputs(), "bonus": None}
    model = trained(Nested(), values)
    quantized = convert(model, values)
    assert quantized.input_names == ("left", "right")
    assert torch.equal(quantized(**values)["logits"], model(**values)["logits"])


class Pair(NamedTuple):
    mean: Tensor
    std: Tensor


@pytest.mark.parametrize(
    ("pack", "names"),
    [
        (lambda a, b: a, ("output",)),
        (lambda a, b: (a, b), ("output_0", "output_1")),
        (lambda a, b: [a, [b]], ("output_0", "output_1_0")),
        (lambda a, b: Pair(a, b), ("mean", "std")),
        (lambda a, b: {"a": a, "n": 3, "b": None, "c": b}, ("a", "c")),
    ],
)
def test_outputs_are_named_by_where_they_stand(
    pack: Callable[[Tensor, Tensor], Any], names: tuple[str, ...]
) -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return pack(y, y * 2)

    model, x = Packing(), torch.randn(4, 3)
    trained(model, x)
    quantized = convert(model, x)
    assert quantized.output_names == names
    assert torch.equal(tensors_of(quantized(x))[0], tensors_of(model(x))[0])


def test_no_two_outputs_share_a_name() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return {"a": [y, y * 2], "a_0": y * 3, "a_0_1": y * 4, "a_1": y * 5}

    x = torch.randn(4, 3)
    assert len(set(convert(trained(Clash(), x), x).output_names)) == 5


def test_an_input_and_an_output_never_share_a_name() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": self.fc(x)}

    model, x = Echo(), torch.randn(4, 3)
    quantized = convert(trained(model, x), x)
    assert set(quantized.input_names).isdisjoint(quantized.output_names)


@pytest.mark.parametrize("nothing", [(), {}, [3], {"flag": True}, None])
def test_inputs_hold_a_tensor(nothing: Any) -> None:
    with pytest.raises(ValueError, match="Inputs must hold at least one tensor"):
        as_call(nothing)


# Structures


class CalledTwice(nn.Module):
    """One convolution, called with a batch norm behind it and without; either order."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.conv = nn.Conv2d(2, 2, 1)
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            return self.conv(self.bn(self.conv(x)))
        return self.bn(self.conv(self.conv(x)))


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


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_layer_called_twice_is_folded_for_one_call_only(norm_first: bool) -> None:
    model, x = CalledTwice(norm_first), torch.randn(4, 2, 3, 3)
    trained(model, x, INPUTS_ONLY)
    quantized = convert(model, x)
    assert "batch_norm" not in operators(quantized)
    assert set(quantized.tensors) == {"conv.input", "conv.weight", "conv.weight_1"}
    plain, folded = (quantized.tensors[f"conv.weight{suffix}"] for suffix in ("", "_1"))
    # gamma of channel 0 is negative: the folded integers are mirrored.
    assert plain.integers is not None
    assert folded.integers is not None
    mirror = torch.tensor([-1, 1]).reshape(2, 1, 1, 1)
    pair = (plain.integers, folded.integers)
    assert torch.equal(pair[0] * mirror, pair[1].long()) or torch.equal(pair[1] * mirror, pair[0])
    # Rounding of the fold, or one step of the second call's input.
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=one_step(model))


def test_a_convolution_that_is_also_used_elsewhere_is_not_folded() -> None:
    class Also(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y

    model, x = Also(), torch.randn(4, 2, 3, 3)
    trained(model, x)
    quantized = convert(model, x)
    assert operators(quantized).count("batch_norm") == 1
    assert torch.equal(quantized(x), model(x))


def test_a_convolution_that_stays_float_is_folded_too() -> None:
    x = inputs_for("conv_bn_relu")
    model = trained(conv_bn_relu(), x, replace(INPUTS_ONLY, exclude=("0",)))
    quantized = convert(model, x)
    assert "batch_norm" not in operators(quantized)
    assert set(quantized.tensors) == {"3.input", "3.weight"}
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=one_step(model))


@pytest.mark.parametrize("padding", ["same", "valid", 1, 0])
def test_every_spelling_of_padding_is_folded(padding: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=padding), nn.BatchNorm2d(3), nn.ReLU())
    x = torch.randn(4, 2, 5, 5)
    quantized = convert(trained(model, x), x)
    assert "batch_norm" not in operators(quantized)
    # Rounding of the fold only.
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=1e-5)


def test_a_linear_layer_s_batch_norm_is_folded_in_2_d() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()), torch.randn(6, 4)
    quantized = convert(trained(model, x), x)
    assert "batch_norm" not in operators(quantized)
    # Rounding of the fold only.
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=1e-5)


def test_a_linear_layer_s_batch_norm_over_time_is_not_folded() -> None:
    # It normalises axis 1, which is time here.
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(5)), torch.randn(6, 5, 4)
    quantized = convert(trained(model, x), x)
    assert operators(quantized).count("batch_norm") == 1
    assert torch.equal(quantized(x), model(x))


def test_a_batch_norm_of_the_batch_s_own_statistics_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    x = torch.randn(4, 2, 3, 3)
    prepare(model)
    model(x)
    model.eval()
    quantized = convert(model, x)
    assert operators(quantized).count("batch_norm") == 1
    assert torch.equal(quantized(x), model(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fold_needs_neither_gamma_nor_bias(affine: bool, bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=bias), nn.BatchNorm2d(3, affine=affine))
    x = torch.randn(4, 2, 3, 3)
    prepare(model)
    model(x)
    model.eval()
    quantized = convert(model, x)
    assert "batch_norm" not in operators(quantized)
    # Rounding of the fold only.
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout2d])
def test_a_dropout_in_between_is_in_nobody_s_way(dropout: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), dropout(), nn.BatchNorm2d(3))
    x = torch.randn(4, 2, 3, 3)
    quantized = convert(trained(model, x), x)
    assert operators(quantized).count("batch_norm") == 0
    # Rounding of the fold only.
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=1e-5)


def test_a_dropout_that_the_forward_keeps_on_in_eval_mode_stays() -> None:
    class MonteCarlo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 64)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.fc(x), 0.5, training=True)

    model, x = MonteCarlo(), torch.randn(2, 4)
    quantized = convert(trained(model, x), x)
    assert bool((model(x) == 0).any())
    assert bool((quantized(x) == 0).any())


@pytest.mark.parametrize("last", [nn.BatchNorm2d(3), nn.Dropout(), nn.Identity()], ids=str)
def test_a_graph_that_ends_in_what_is_removed_stays_consistent(
    last: nn.Module, tmp_path: Path
) -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 1), last), torch.randn(4, 2, 3, 3)
    quantized = convert(trained(model, x), x)
    output = quantized.program.graph.output_node().args[0][0]  # type: ignore[index, union-attr]
    assert quantized.program.graph_signature.user_outputs == (output.name,)
    quantized.program.validate()
    quantized.save(tmp_path / "model.pt2")
    assert torch.equal(QuantizedModel.load(tmp_path / "model.pt2")(x), quantized(x))


def test_amct_s_grid_saturates_with_a_warning_that_names_the_weight() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), torch.ones(2, 2, 3, 3)
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([-1.0, 0.5]).reshape(1, 2, 1, 1)
    trained(model, x, "amct")
    with pytest.warns(UserWarning, match=r"0\.weight: 1 integers of the folded weight saturate"):
        quantized = convert(model, x)
    integers = quantized.tensors["0.weight"].integers
    assert integers is not None
    assert integers.flatten().tolist() == [127, -64, -128, 64]


# Compiled modules


@pytest.mark.parametrize("where", ["root", "submodule", "layer", "both", "in place"])
def test_what_torch_compile_wrapped_is_unwrapped(where: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    x = torch.randn(3, 4)
    trained(model, x, INPUTS_ONLY)
    expected = model(x)
    live: Any = model
    if where in ("layer", "both"):
        model[1][1] = torch.compile(model[1][1], backend="eager")
    if where in ("submodule", "both"):
        model[1] = torch.compile(model[1], backend="eager")
    if where in ("root", "both"):
        live = torch.compile(model, backend="eager")
    if where == "in place":
        model.compile(backend="eager")
    quantized = convert(live, x)
    assert set(quantized.tensors) == {"0.input", "0.weight", "1.1.input", "1.1.weight"}
    assert torch.equal(quantized(x), expected)


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
        model.conv1.weight_quantizer.scale[0] = float("nan")
        model.head.input_quantizer.scale.fill_(float("inf"))
    with pytest.raises(
        ValueError, match=r"head: its range is not finite.*conv1: the learned scale"
    ):
        convert(model, x)


class Branching(nn.Module):
    """Control flow that depends on the data, in a submodule."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            if y.sum() > 0:
                return y
            return -y

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("capture", [convert, check_capture])
def test_control_flow_on_data_is_named_with_module_and_line(capture: Callable[..., Any]) -> None:
    model, x = Branching(), torch.randn(2, 3)
    trained(model, x)
    with pytest.raises(
        CaptureError,
        match=r"could not capture Branching\.forward: it failed in module 'block' \(Inner\) "
        r"\(test_convert\.py, line \d+: if y\.sum\(\) > 0:\).*torch\.where",
    ):
        capture(model, x)


def test_inputs_that_do_not_fit_are_named_where_they_failed() -> None:
    x = inputs_for("linear")
    with pytest.raises(CaptureError, match=r"it failed in module '0' \(LinearQAT\)"):
        convert(trained(linear(), x), torch.randn(4, 7))


@pytest.mark.parametrize("network", NETWORKS)
def test_capture_can_be_checked_before_any_batch(network: str) -> None:
    model = NETWORKS[network][0]()
    prepare(model)
    before = snapshot(model)
    check_capture(model, inputs_for(network))
    assert same(snapshot(model), before)
    assert not any(
        m.input_quantizer.calibrated  # type: ignore[union-attr]
        for m in model.modules()
        if isinstance(m, QATLayer)
    )


# The result


@pytest.mark.parametrize("network", NETWORKS)
def test_a_saved_model_is_the_same_model(network: str, tmp_path: Path) -> None:
    x = inputs_for(network)
    quantized = convert(trained(NETWORKS[network][0](), x), x, recipe=Recipe.load("w4a8"))
    quantized.save(tmp_path / "deep" / "model.pt2")
    loaded = QuantizedModel.load(tmp_path / "deep" / "model.pt2")
    assert (loaded.input_names, loaded.output_names) == (
        quantized.input_names,
        quantized.output_names,
    )
    assert Recipe.from_dict(loaded.recipe) == Recipe.load("w4a8")
    assert list(loaded.tensors) == list(quantized.tensors)
    for key, tensor in quantized.tensors.items():
        assert loaded.tensors[key].qparams.equal(tensor.qparams)
        if tensor.integers is not None:
            assert torch.equal(loaded.tensors[key].integers, tensor.integers)  # type: ignore[arg-type]
    assert torch.equal(loaded(x), quantized(x))
    assert torch.equal(loaded.example_inputs[0][0], quantized.example_inputs[0][0])
    assert loaded(x[:1]).shape[0] == 1


def test_loading_what_is_not_there_or_not_ours_says_so(tmp_path: Path) -> None:
    missing, other = tmp_path / "no.pt2", tmp_path / "other.pt2"
    with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
        QuantizedModel.load(missing)
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not a model that QuantizedModel\.save wrote"):
        QuantizedModel.load(other)
    torch.export.save(torch.export.export(linear(), (torch.randn(2, 6),)), other)
    with pytest.raises(ValueError, match=r"is not a model that QuantizedModel\.save wrote"):
        QuantizedModel.load(other)


def test_a_file_of_a_newer_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = inputs_for("linear")
    quantized = convert(trained(linear(), x), x)
    monkeypatch.setattr("lightning_qat.ir.quantized_model.FORMAT_VERSION", 99)
    quantized.save(tmp_path / "new.pt2")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has format version 99; this version of lightning-qat"):
        QuantizedModel.load(tmp_path / "new.pt2")


def test_a_finalized_copy_is_on_the_cpu_in_eval_mode_with_the_model_s_outputs() -> None:
    x = inputs_for("linear")
    model = trained(linear(), x).train()
    final = finalized_copy(model)
    assert not any(m.training for m in final.modules())
    assert torch.equal(final(x), model.eval()(x))


def test_integers_outside_their_grid_are_no_tensor() -> None:
    qparams = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), IntegerGrid(-8, 7))
    with pytest.raises(ValueError, match=r"'w': integers must lie in .*; got 0 \.\. 8"):
        QuantizedTensor("w", "weight", qparams, torch.tensor([0, 8]))


def test_scales_that_do_not_fit_the_axis_are_no_tensor() -> None:
    scale, origin = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="'w': one scale per channel of axis 0 is needed; got 2"):
        QuantizedTensor(
            "w", "weight", QParams(scale, origin, IntegerGrid(-8, 7), 0), torch.zeros(3, 2).char()
        )


def test_a_constant_s_name_is_used_once() -> None:
    x = inputs_for("linear")
    program = convert(trained(linear(), x), x).program
    name, constants = next(iter(program.state_dict)), Constants(program)
    first, second = (constants.add(name, torch.tensor(value)) for value in (1.0, 2.0))
    assert (constants.name(first), constants.name(second)) == (f"{name}_1", f"{name}_2")
    assert (constants.value(first), constants.value(second)) == (1.0, 2.0)


def test_the_constants_of_a_program_are_listed_equally_often_for_all_depths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = []
    real = ExportGraphSignature.inputs_to_buffers.fget

    def counted(signature: ExportGraphSignature) -> Any:
        listed[-1] += 1
        return real(signature)

    monkeypatch.setattr(ExportGraphSignature, "inputs_to_buffers", property(counted))
    for depth in (1, 4):
        x = torch.randn(2, 2, 4, 4)
        pairs = [(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(depth)]
        model = trained(nn.Sequential(*(layer for pair in pairs for layer in pair)), x)
        listed.append(0)
        assert len(convert(model, x).layers) == depth
    assert listed[0] == listed[1]
