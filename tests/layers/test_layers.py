"""QAT layers: a float layer whose input and weight are fake-quantized, and nothing else."""

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.layers import Conv2dQAT, LinearQAT, QATLayer
from lightning_qat.numerics.arithmetic import affine_qparams
from lightning_qat.numerics.fake_quantize import fake_quantize
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec

CONVS: list[dict[str, Any]] = [
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3},
    {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 1), "stride": 2, "padding": (1, 0)},
    {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "dilation": 2},
    {"in_channels": 4, "out_channels": 2, "kernel_size": 3, "padding": "same", "bias": False},
]


def powers_of_two(layer: QATLayer, x: Tensor) -> Tensor:
    """Give weight and input ranges whose scales are powers of two: exact in every framework."""
    with torch.no_grad():
        weight = layer.weight
        weight.mul_(0.9 / weight.abs().max())
        weight.view(len(weight), -1)[:, 0] = 127 / 128
    x = x.clamp(-0.9, 0.9)
    x.view(-1)[0], x.view(-1)[1] = -1.0, 127 / 128
    return x


def calibrate(layer: nn.Module, x: Tensor) -> nn.Module:
    layer.train()
    with torch.no_grad():
        layer(x)
    return layer.eval()


# Forward


@pytest.mark.parametrize("arguments", CONVS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_convolves_tensors_that_torch_fake_quantized(
    arguments: dict[str, Any], training: bool
) -> None:
    layer = Conv2dQAT(**arguments)
    x = powers_of_two(layer, torch.randn(2, 4, 7, 7))
    calibrate(layer, x).train(training)
    weight = torch.fake_quantize_per_channel_affine(
        layer.weight,
        torch.full((len(layer.weight),), 2.0**-7),
        torch.zeros(len(layer.weight), dtype=torch.int32),
        *(0, -127, 127),
    )
    expected = F.conv2d(
        torch.fake_quantize_per_tensor_affine(x, 2.0**-7, 0, -128, 127),
        weight,
        layer.bias,
        *(layer.stride, layer.padding, layer.dilation, layer.groups),
    )
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8, 6), (2, 5, 6), (6,)])
def test_a_linear_layer_multiplies_tensors_that_torch_fake_quantized(
    bias: bool, shape: tuple[int, ...]
) -> None:
    layer = LinearQAT(6, 3, bias=bias)
    x = powers_of_two(layer, torch.randn(*shape))
    calibrate(layer, x)
    scale, origin = torch.full((3,), 2.0**-7), torch.zeros(3, dtype=torch.int32)
    expected = F.linear(
        torch.fake_quantize_per_tensor_affine(x, 2.0**-7, 0, -128, 127),
        torch.fake_quantize_per_channel_affine(layer.weight, scale, origin, 0, -127, 127),
        layer.bias,
    )
    assert torch.equal(layer(x), expected)


def test_the_config_reaches_both_quantizers() -> None:
    recipe = Recipe(
        weight=WeightSpec(bits=4, granularity="per_tensor"), activation=ActivationSpec(bits=2)
    )
    for layer in (Conv2dQAT(2, 3, 1, config=recipe), LinearQAT(2, 3, config=recipe)):
        assert layer.weight_quantizer.spec == recipe.weight  # type: ignore[union-attr]
        assert layer.input_quantizer.spec == recipe.activation  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("config", "bits"), [(None, 8), ("w4a8", 4), ({"preset": "int8", "weight": {"bits": 2}}, 2)]
)
def test_a_config_may_be_nothing_a_preset_or_a_mapping(config: Any, bits: int) -> None:
    assert LinearQAT(2, 3, config=config).weight_quantizer.spec.bits == bits  # type: ignore[union-attr]
    assert (
        LinearQAT.from_float(nn.Linear(2, 3), config).weight_quantizer.spec.bits == bits  # type: ignore[union-attr]
    )


def test_amct_makes_linear_per_tensor() -> None:
    assert LinearQAT(2, 3, config="amct").weight_quantizer.spec.granularity == "per_tensor"  # type: ignore[union-attr]
    assert Conv2dQAT(2, 3, 1, config="amct").weight_quantizer.spec.granularity == "per_channel"  # type: ignore[union-attr]


def test_the_gradient_reaches_weight_bias_and_input() -> None:
    layer, x = Conv2dQAT(2, 3, 3), torch.randn(1, 2, 5, 5, requires_grad=True)
    layer(x).square().sum().backward()
    for leaf in (layer.weight, layer.bias, x):
        assert leaf is not None
        assert leaf.grad is not None
        assert bool(leaf.grad.abs().sum() > 0)


def test_the_weight_gradient_is_that_of_a_layer_with_the_quantized_weight() -> None:
    layer, x = LinearQAT(4, 3), torch.randn(5, 4)
    calibrate(layer, x)
    layer(x).square().sum().backward()
    quantized = layer.weight_quantizer(layer.weight).detach().requires_grad_()  # type: ignore[arg-type]
    F.linear(layer.input_quantizer(x), quantized, layer.bias).square().sum().backward()
    assert layer.weight.grad is not None
    assert quantized.grad is not None
    assert torch.equal(layer.weight.grad, quantized.grad)


# There and back


@pytest.mark.parametrize(
    ("qat", "layer", "x"),
    [
        (Conv2dQAT, nn.Conv2d(2, 3, 3, padding=1), torch.ones(1, 2, 4, 4)),
        (LinearQAT, nn.Linear(4, 3, bias=False), torch.ones(2, 4)),
    ],
)
def test_from_float_shares_parameters_and_leaves_the_float_layer_as_it_was(
    qat: type[QATLayer], layer: nn.Module, x: Tensor
) -> None:
    names, expected = list(layer.state_dict()), layer(x)
    twin = qat.from_float(layer)
    assert type(twin) is qat
    assert twin is not layer
    assert type(layer) is qat.float_class
    assert list(layer.state_dict()) == names
    assert not list(layer.children())
    assert twin.weight is layer.weight
    assert dict(twin.named_parameters()).keys() == dict(layer.named_parameters()).keys()
    assert torch.equal(layer(x), expected)


def test_from_float_keeps_hooks_and_mode_apart() -> None:
    layer = nn.Linear(2, 2).eval()
    seen: list[str] = []
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    twin = LinearQAT.from_float(layer)
    assert not twin.input_quantizer.training
    twin(torch.ones(1, 2))
    assert seen == ["hook"]
    twin.register_forward_hook(lambda *_: seen.append("own"))
    layer(torch.ones(1, 2))
    assert seen == ["hook", "hook"]


def test_to_float_after_from_float_is_the_layer_again() -> None:
    for qat, layer in ((Conv2dQAT, nn.Conv2d(2, 3, 3)), (LinearQAT, nn.Linear(4, 3))):
        twin = qat.from_float(layer)
        back = twin.to_float()
        assert type(back) is type(layer)
        assert back.weight is layer.weight
        assert list(back.state_dict()) == list(layer.state_dict())
        assert repr(back) == repr(layer)
        assert back.__dict__.keys() == layer.__dict__.keys()
        assert hasattr(twin, "input_quantizer")


def test_to_float_of_a_layer_from_its_constructor_is_a_float_layer() -> None:
    qat, x = Conv2dQAT(2, 3, 3), torch.randn(1, 2, 5, 5)
    assert torch.equal(qat.to_float()(x), F.conv2d(x, qat.weight, qat.bias))


@pytest.mark.parametrize("qat", [Conv2dQAT(2, 3, 3), LinearQAT(4, 3)])
def test_the_state_dict_is_the_float_layer_s_plus_two_quantizers(qat: QATLayer) -> None:
    assert list(qat.state_dict()) == [
        "weight",
        "bias",
        "input_quantizer.min_val",
        "input_quantizer.max_val",
        "input_quantizer.batches",
        "input_quantizer._extra_state",
        "weight_quantizer._extra_state",
    ]
    qat.load_state_dict(qat.to_float().state_dict())
    qat.to_float().load_state_dict({"weight": qat.weight, "bias": qat.bias})


def test_a_copy_is_independent() -> None:
    layer, x = LinearQAT(4, 3), torch.randn(5, 4)
    calibrate(layer, x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.weight.zero_()
    assert bool(layer.weight.abs().sum() > 0)


def test_quantizers_are_made_on_the_layer_s_device() -> None:
    layer = LinearQAT.from_float(nn.Linear(2, 2, device="meta"))
    assert layer.input_quantizer.min_val.device.type == "meta"  # type: ignore[union-attr]


# What is refused


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes_are_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match=f"Conv2dQAT: padding_mode must be 'zeros'; got '{mode}'"):
        Conv2dQAT(2, 3, 3, padding=1, padding_mode=mode)
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
    with pytest.raises(ValueError, match="Conv2d cannot become Conv2dQAT: padding_mode must be"):
        Conv2dQAT.from_float(layer)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 2, 1), LinearQAT(2, 2)])
def test_only_its_float_type_is_taken(layer: nn.Module) -> None:
    kind = type(layer)
    text = f"LinearQAT quantizes float layers of Linear; got {kind.__name__}"
    with pytest.raises(TypeError, match=re.escape(text)):
        LinearQAT.from_float(layer)
    assert type(layer) is kind


def test_a_config_that_keeps_the_layer_float_is_refused() -> None:
    with pytest.raises(ValueError, match="The recipe keeps Linear layers float, so it cannot"):
        LinearQAT(2, 2, config={"overrides": {"type:Linear": None}})


# Under precision plugins and compilers


@pytest.mark.parametrize(
    ("layer", "x"),
    [(LinearQAT(8, 4), torch.randn(3, 8)), (Conv2dQAT(2, 3, 3), torch.randn(1, 2, 5, 5))],
)
def test_autocast_casts_the_product_but_not_the_quantization(layer: QATLayer, x: Tensor) -> None:
    layer.train()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype is torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is torch.float32
    quantizer = layer.input_quantizer
    assert quantizer.min_val.dtype is torch.float32  # type: ignore[union-attr]
    scale, origin = affine_qparams(x.min(), x.max(), IntegerGrid(-128, 127))
    layer.eval()
    assert torch.equal(quantizer(x), fake_quantize(x, scale, origin, IntegerGrid(-128, 127)))


def test_a_bfloat16_input_under_autocast_gets_a_float32_range() -> None:
    layer, x = LinearQAT(8, 4).train(), torch.randn(3, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert layer.input_quantizer.max_val.item() == x.max().item()  # type: ignore[union-attr]


# Dynamo itself instantiates an autograd.Function to trace ours.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("deferred", [True, False])
def test_a_compiled_layer_computes_and_observes_the_same(deferred: bool) -> None:
    torch._dynamo.reset()
    eager, x = LinearQAT(8, 4), torch.randn(3, 8)
    eager(x)
    eager.input_quantizer.deferred = deferred  # type: ignore[union-attr]
    compiled_layer = copy.deepcopy(eager)
    compiled = torch.compile(compiled_layer, backend="eager")
    for _ in range(2):
        x = torch.randn(3, 8) * 3
        results = []
        for layer in (eager, compiled):
            y = layer(x)
            y.square().sum().backward()
            results.append(y.detach())
        assert torch.equal(*results)
    assert eager.weight.grad is not None
    assert compiled_layer.weight.grad is not None
    assert torch.equal(eager.weight.grad, compiled_layer.weight.grad)
    states = [layer.input_quantizer for layer in (eager, compiled_layer)]
    for name in ("min_val", "max_val", "batches"):
        assert torch.equal(getattr(states[0], name), getattr(states[1], name))
    pending = [q.pending for q in states]  # type: ignore[union-attr]
    assert (pending[0] is None) is (not deferred)
    assert deferred is False or torch.equal(*pending)  # type: ignore[arg-type]
