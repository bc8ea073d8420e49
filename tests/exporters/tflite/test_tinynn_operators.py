"""Every operator of the tinynn backend against torch."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import WeightSpec
from tests import join_networks, models
from tests.exporters.tflite.litert_operators import assert_as_defined
from tests.exporters.tflite.tinynn_files import (
    PICTURE,
    ROWS,
    RUNTIMES,
    FileOperator,
    file_of,
    needs_litert,
    needs_tinynn,
    quantized_model,
    read,
    samples,
    steps_apart,
    written,
)


class Function(nn.Module):
    """A function as a network, beside the layer that every network must have."""

    def __init__(self, function: Callable[..., Any], width: int = 8) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(width, 2)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        inputs = (x,) if y is None else (x, y)
        return self.function(*inputs), self.layer(x)


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("network", join_networks.CNNS)
def test_every_operator_computes_what_its_definition_says_of_its_own_inputs(network: str) -> None:
    assert_as_defined(file_of(network), join_networks.inputs_for(network, 8))


INTEGER_FORMS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], str]] = {
    "add": (lambda x, y: x + y, (PICTURE, PICTURE), "ADD"),
    "add, broadcast": (lambda x, y: x + y, (PICTURE, (4, 1, 1)), "ADD"),
    "add, relu": (lambda x, y: F.relu(x + y), (PICTURE, PICTURE), "ADD"),
    "sub": (lambda x, y: x - y, (PICTURE, PICTURE), "SUB"),
    "mul": (lambda x, y: x * y, (PICTURE, PICTURE), "MUL"),
    "mul, relu6": (lambda x, y: F.relu6(x * y), (PICTURE, PICTURE), "MUL"),
    "cat": (lambda x, y: torch.cat((x, y), 1), (PICTURE, PICTURE), "CONCATENATION"),
    "cat, last axis": (lambda x, y: torch.cat((x, y), -1), (ROWS, ROWS), "CONCATENATION"),
    "stack": (lambda x, y: torch.stack((x, y), 1), (ROWS, ROWS), "CONCATENATION"),
    "matmul": (lambda x, y: x @ y, (ROWS, (8, 5)), "BATCH_MATMUL"),
    "bmm": (torch.bmm, (ROWS, (8, 5)), "BATCH_MATMUL"),
    "mean": (lambda x: x.mean((2, 3)), (PICTURE,), "MEAN"),
    "mean, kept": (lambda x: x.mean((2, 3), keepdim=True), (PICTURE,), "MEAN"),
    "mean of rows": (lambda x: x.mean(1), (ROWS,), "MEAN"),
    "average pool": (lambda x: F.avg_pool2d(x, 2), (PICTURE,), "DEPTHWISE_CONV_2D"),
    "average pool, padded": (
        lambda x: F.avg_pool2d(x, 3, 1, 1),
        (PICTURE,),
        "DEPTHWISE_CONV_2D",
    ),
    "adaptive average pool": (
        lambda x: F.adaptive_avg_pool2d(x, 4),
        (PICTURE,),
        "DEPTHWISE_CONV_2D",
    ),
    "global average pool": (lambda x: F.adaptive_avg_pool2d(x, 1), (PICTURE,), "MEAN"),
    "softmax": (lambda x: F.softmax(x, -1), (ROWS,), "SOFTMAX"),
    "softmax, channels": (lambda x: F.softmax(x, 1), (PICTURE,), "SOFTMAX"),
    "sigmoid": (torch.sigmoid, (PICTURE,), "LOGISTIC"),
    "tanh": (torch.tanh, (PICTURE,), "TANH"),
    "hardswish": (F.hardswish, (PICTURE,), "HARD_SWISH"),
    "hardsigmoid": (F.hardsigmoid, (PICTURE,), "ADD"),
    "gelu": (F.gelu, (ROWS,), "GELU"),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), (ROWS,), "GELU"),
    "silu": (F.silu, (PICTURE,), "LOGISTIC"),
    "elu": (F.elu, (PICTURE,), "ELU"),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), (PICTURE,), "LEAKY_RELU"),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.2])), (PICTURE,), "LEAKY_RELU"),
    "average pool of rows": (lambda x: F.avg_pool1d(x, 2), (ROWS,), "DEPTHWISE_CONV_2D"),
    "adaptive pool of rows": (lambda x: F.adaptive_avg_pool1d(x, 4), (ROWS,), "DEPTHWISE_CONV_2D"),
    "global pool of rows": (lambda x: F.adaptive_avg_pool1d(x, 1), (ROWS,), "MEAN"),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), (PICTURE,), "RESIZE_NEAREST_NEIGHBOR"),
    "bilinear": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        (PICTURE,),
        "RESIZE_BILINEAR",
    ),
    "linear": (
        lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
        (ROWS,),
        "RESIZE_BILINEAR",
    ),
}
"""Name to the function, the shapes of its inputs, and the operator that must be in the file."""


def is_float(operator: FileOperator) -> bool:
    """Whether it computes with floats; moving values to and from float does not."""
    moves = ("QUANTIZE", "DEQUANTIZE", "TRANSPOSE")
    return operator.name not in moves and any(
        tensor.dtype == "FLOAT32" for tensor in (*operator.inputs, *operator.outputs)
    )


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("name", INTEGER_FORMS)
def test_a_join_is_one_step_from_torch_in_integers(name: str) -> None:
    function, shapes, operator = INTEGER_FORMS[name]
    model = quantized_model(Function(function), samples(shapes, 4))
    data = written(model)
    file = read(data)
    assert operator in file.counts
    assert not [o.name for o in file.operators if is_float(o)]
    x = list(samples(shapes, 8))
    for runtime in RUNTIMES:
        # LiteRT's reference kernels have no int8 ELU.
        if (name, runtime) != ("elu", "reference"):
            assert steps_apart(model, data, x, runtime).max() <= 1.001


PASSING: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "relu": (F.relu, set()),
    "relu6": (F.relu6, set()),
    "hardtanh": (F.hardtanh, set()),
    "clamp": (lambda x: x.clamp(-0.3, 0.7), {"MINIMUM"}),
    "clamp from below": (lambda x: x.clamp(min=-0.2), set()),
    "clamp from above": (lambda x: x.clamp_max(0.2), set()),
    "max pool": (lambda x: F.max_pool2d(x, 2), {"MAX_POOL_2D"}),
    "max pool, padded": (lambda x: F.max_pool2d(x, 3, 2, 1), {"PADV2", "MAX_POOL_2D"}),
    "max pool, relu": (lambda x: F.relu(F.max_pool2d(x, 2)), {"MAX_POOL_2D"}),
    "adaptive max pool": (lambda x: F.adaptive_max_pool2d(x, 2), {"MAX_POOL_2D"}),
    "max pool of rows": (lambda x: F.max_pool1d(x[:, 0], 2), {"GATHER", "RESHAPE", "MAX_POOL_2D"}),
    "adaptive max pool of rows": (
        lambda x: F.adaptive_max_pool1d(x[:, 0], 2),
        {"GATHER", "RESHAPE", "MAX_POOL_2D"},
    ),
    "amax": (lambda x: x.amax((2, 3)), {"REDUCE_MAX"}),
    "amax, kept": (lambda x: x.amax((2, 3), keepdim=True), {"REDUCE_MAX"}),
    "min": (lambda x: x.min(-1).values, {"REDUCE_MIN"}),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1)), {"PAD"}),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), {"MIRROR_PAD"}),
    "flatten": (lambda x: x.flatten(1), {"RESHAPE"}),
    "permute, flatten": (lambda x: x.permute(0, 2, 3, 1).flatten(1), {"RESHAPE"}),
    "permute, reshape": (
        lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4),
        {"RESHAPE"},
    ),
    "transpose, ravel": (lambda x: x.mT.reshape(x.shape[0], -1), {"RESHAPE"}),
    "detach": (lambda x: x.detach(), set()),
    "permute": (lambda x: x.permute(0, 2, 3, 1), set()),
    "transpose": (lambda x: x.transpose(1, 2).contiguous(), set()),
    "unsqueeze": (lambda x: x.unsqueeze(1), {"RESHAPE"}),
    "slice": (lambda x: x[:, :, 1:-1, ::2], {"STRIDED_SLICE"}),
    "narrow": (lambda x: x.narrow(1, 1, 2), {"SLICE"}),
    "select": (lambda x: x[:, 0], {"GATHER", "RESHAPE"}),
    "index select": (lambda x: x.index_select(1, torch.tensor([0, 2])), {"GATHER"}),
    "indices": (lambda x: x[:, [2, 0, -1]], {"GATHER"}),
    "indices in rows": (lambda x: x[:, torch.tensor([[2, 0], [1, 1]])], {"GATHER", "RESHAPE"}),
    "repeat interleave": (lambda x: x.repeat_interleave(2, 1), {"GATHER"}),
    "nearest of rows": (
        lambda x: F.interpolate(x[:, 0], scale_factor=2),
        {"GATHER", "RESHAPE", "RESIZE_NEAREST_NEIGHBOR"},
    ),
    "nearest, exact": (
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
        {"RESIZE_NEAREST_NEIGHBOR"},
    ),
    "chunk": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), {"SPLIT_V", "CONCATENATION"}),
    "split": (lambda x: x.split([1, 3], 1)[1], {"SPLIT_V"}),
    "unbind": (lambda x: x.unbind(1)[2], {"GATHER", "RESHAPE"}),
    "expand": (lambda x: x[:, :1].expand(-1, 4, -1, -1), {"SLICE", "TILE"}),
    "tile": (lambda x: x.tile(2, 1, 1), {"TILE"}),
    "flip": (lambda x: x.flip(3), {"REVERSE_V2"}),
    "roll": (lambda x: x.roll(1, 2), {"SLICE", "CONCATENATION"}),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), {"DEPTH_TO_SPACE"}),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), {"SPACE_TO_DEPTH", "GATHER"}),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 2), {"RESHAPE"}),
    "channel shuffle by hand": (
        lambda x: x.reshape(x.shape[0], 2, 2, 8, 8).transpose(1, 2).reshape(x.shape[0], 4, 8, 8),
        {"RESHAPE"},
    ),
    "dropout": (lambda x: F.dropout(x, training=False), set()),
}
"""Name to the function, and the operators that a file needs for it."""


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("name", PASSING)
def test_an_operator_that_hands_values_on_needs_no_quantization(name: str) -> None:
    function, operators = PASSING[name]
    shapes = (PICTURE, PICTURE)
    model = quantized_model(Function(lambda x, y: function(x * y)), samples(shapes, 4))
    data = written(model)
    counts = read(data).counts
    assert (counts.pop("QUANTIZE"), counts.pop("DEQUANTIZE")) == (2, 2)
    assert counts.keys() - {"TRANSPOSE"} == operators | {"MUL", "FULLY_CONNECTED"}
    assert steps_apart(model, data, list(samples(shapes, 8))).max() <= 1.001


FLOAT_FORMS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "attention": (
        lambda x, y: F.scaled_dot_product_attention(x, y, y),
        ((2, 6, 8), (2, 6, 8)),
    ),
    "mish": (F.mish, (PICTURE,)),
    "layer norm": (lambda x, y: F.layer_norm(x + y, (8,)) + y, (ROWS, ROWS)),
    "scalars": (lambda x, y: (1 - x) * y + 2, (PICTURE, PICTURE)),
    "division": (lambda x, y: x * (1 / (y.abs() + 1)), (PICTURE, PICTURE)),
    "exponential": (lambda x, y: x * torch.exp(-y.pow(2)), (PICTURE, PICTURE)),
    "sum": (lambda x, y: x * y.abs().sum((2, 3), keepdim=True).sqrt(), (PICTURE, PICTURE)),
}


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("name", FLOAT_FORMS)
def test_what_has_no_integer_kernel_is_computed_in_float_on_quantized_values(name: str) -> None:
    function, shapes = FLOAT_FORMS[name]
    model = quantized_model(Function(function), samples(shapes, 4))
    data = written(model)
    assert [o.name for o in read(data).operators if is_float(o)]
    unfusable = steps_apart(model, data, list(samples(shapes, 8)))
    assert np.mean(unfusable > 0.5) < 0.03
    assert unfusable.max() <= 1.001


@needs_tinynn
@needs_litert
def test_a_value_that_is_quantized_and_read_as_float_keeps_its_rounding() -> None:
    # Its optimizer takes QUANTIZE and DEQUANTIZE in a row for nothing.
    shapes = (ROWS, ROWS)
    model = quantized_model(Function(lambda x, y: F.mish(y) + x), samples(shapes, 4))
    data = written(model)
    operators = read(data).operators
    quantized = [t.name for o in operators if o.name == "QUANTIZE" for t in o.outputs]
    read_as_float = [o.inputs[0].name for o in operators if o.name == "DEQUANTIZE"]
    assert len(set(quantized) & set(read_as_float)) == 1
    assert np.mean(steps_apart(model, data, list(samples(shapes, 8))) > 0.5) < 0.01


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_the_one_that_torch_computes(approximate: str) -> None:
    # The two are less than a step apart.
    function = functools.partial(F.gelu, approximate=approximate)
    model = quantized_model(Function(function), samples((ROWS,), 4))
    file = read(written(model))
    (options,) = (o.options for o in file.operators if o.name == "GELU")
    assert options.approximate == (approximate == "tanh")


# Layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "pointwise": (lambda: nn.Conv2d(4, 3, 1), PICTURE, "CONV_2D"),
    "no bias": (lambda: nn.Conv2d(4, 3, 3, bias=False), PICTURE, "CONV_2D"),
    "strided": (lambda: nn.Conv2d(4, 3, 3, stride=2, padding=1), PICTURE, "CONV_2D"),
    "one-sided": (lambda: nn.Conv2d(4, 3, (1, 5), padding=(0, 2)), PICTURE, "CONV_2D"),
    "dilated": (lambda: nn.Conv2d(4, 3, 3, dilation=2, padding=2), PICTURE, "CONV_2D"),
    "same": (lambda: nn.Conv2d(4, 3, 3, padding="same"), PICTURE, "CONV_2D"),
    "same, even kernel": (lambda: nn.Conv2d(4, 3, (2, 4), padding="same"), PICTURE, "CONV_2D"),
    "valid": (lambda: nn.Conv2d(4, 3, 3, padding="valid"), PICTURE, "CONV_2D"),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), PICTURE, "CONV_2D"),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), PICTURE, "DEPTHWISE_CONV_2D"),
    "depthwise, twice": (lambda: nn.Conv2d(4, 8, 3, groups=4), PICTURE, "DEPTHWISE_CONV_2D"),
    "one channel": (lambda: nn.Conv2d(1, 4, 3), (1, 8, 8), "CONV_2D"),
    "linear": (lambda: nn.Linear(8, 5), (8,), "FULLY_CONNECTED"),
    "linear, 3-D": (lambda: nn.Linear(8, 5), ROWS, "FULLY_CONNECTED"),
    "linear, 4-D": (lambda: nn.Linear(8, 5, bias=False), PICTURE, "FULLY_CONNECTED"),
}

PER_TENSOR = Recipe(weight=WeightSpec(granularity="per_tensor"))


@needs_tinynn
@needs_litert
# torch copies the input of such a layer, and says so.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(
    "recipe", ["int8", models.EVERY_LAYER["w4a8"], PER_TENSOR], ids=["int8", "w4a8", "tensor"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_one_step_from_torch(name: str, recipe: str | Recipe) -> None:
    make, shape, operator = LAYERS[name]
    (x,) = samples((shape,), 4)
    model = quantized_model(nn.Sequential(make()), x, recipe)
    data = written(model)
    file = read(data)
    assert operator in file.counts
    weight, stored = model.tensors["0.weight"], file.tensors["0.weight"]
    assert weight.integers is not None
    assert stored.values is not None
    assert sorted(stored.values.ravel()) == sorted(weight.integers.numpy().ravel())
    np.testing.assert_array_equal(stored.scale, weight.qparams.scale.numpy().reshape(-1))
    for runtime in RUNTIMES:
        (x,) = samples((shape,), 8)
        assert steps_apart(model, data, x, runtime).max() <= 1.001


@needs_tinynn
@needs_litert
@pytest.mark.parametrize(
    ("activation", "function"),
    [(nn.ReLU(), "RELU"), (nn.ReLU6(), "RELU6"), (nn.Hardtanh(), "RELU_N1_TO_1")],
)
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 1), nn.Linear(8, 8)], ids=["conv", "linear"])
def test_an_activation_becomes_part_of_the_kernel(
    layer: nn.Module, activation: nn.Module, function: str
) -> None:
    (x,) = samples((PICTURE,), 4)
    model = quantized_model(nn.Sequential(layer, activation), x)
    file = read(written(model))
    kernel = next(o for o in file.operators if o.name in ("CONV_2D", "FULLY_CONNECTED"))
    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    assert kernel.options.fusedActivationFunction == getattr(
        schema.ActivationFunctionType, function
    )


class Forked(nn.Module):
    """A result that is read as it is and clamped: two grids behind one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.left(y) + self.right(F.hardtanh(y, -0.2, 0.2))


@needs_tinynn
@needs_litert
def test_a_result_on_two_grids_takes_the_wider_one_first() -> None:
    (x,) = samples((PICTURE,), 4)
    model = quantized_model(Forked(), x)
    data = written(model)
    stem = next(o for o in read(data).operators if o.name == "CONV_2D")
    assert stem.outputs[0].scale[0] == model.tensors["left.input"].qparams.scale.item()
    assert read(data).counts["QUANTIZE"] == 2
    assert steps_apart(model, data, x).max() <= 2.001
