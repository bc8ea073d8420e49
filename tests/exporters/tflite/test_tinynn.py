"""Whole files of the tinynn backend: numbers, inputs, outputs, refusals."""

import importlib.util
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.protocol import UnsupportedByTarget
from lightning_qat.numerics.arithmetic import quantize_bias
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from tests import join_networks, models
from tests.exporters.tflite.tinynn_files import (
    PICTURE,
    ROWS,
    RUNTIMES,
    converted,
    file_of,
    needs_litert,
    needs_tinynn,
    quantized_model,
    read,
    run,
    samples,
    steps_apart,
    written,
)

# The file's numbers


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("network", join_networks.NETWORKS)
def test_integers_scales_and_biases_are_the_model_s(network: str) -> None:
    model, file = converted(network), read(file_of(network))
    layers = {layer.weight_key: layer for layer in model.layers}
    for key, layer in layers.items():
        weight, stored = model.tensors[key], file.tensors[key]
        assert weight.integers is not None
        assert stored.values is not None
        values = stored.values
        if values.ndim == 4:
            depthwise = stored.axis == 3
            values = values.transpose((3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
        np.testing.assert_array_equal(values, weight.integers.numpy())
        np.testing.assert_array_equal(stored.scale, weight.qparams.scale.numpy())
        assert not stored.zero_point.any()
        scale = model.tensors[layer.input_key].qparams.scale * weight.qparams.scale
        bias = file.tensors[key.removesuffix("weight") + "bias"]
        np.testing.assert_array_equal(bias.scale, scale.numpy())
        expected = torch.zeros(len(weight.integers)) if layer.bias is None else layer.bias
        integers = quantize_bias(
            expected, model.tensors[layer.input_key].qparams.scale, weight.qparams.scale
        )
        assert bias.values is not None
        np.testing.assert_array_equal(bias.values, integers.numpy())
    assert len(layers) == len([t for t in model.tensors.values() if t.kind == "weight"])


FIXED = {(1 / 256, -128), (1 / 128, 0)}
"""Grids of kernels whose results have one by TFLite's specification."""


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("network", join_networks.NETWORKS)
def test_every_activation_lies_on_a_grid_of_the_model(network: str) -> None:
    activations = [t.qparams for t in converted(network).tensors.values() if t.kind != "weight"]
    # hardsigmoid adds 3 on the grid of its result, six times as coarse, and takes a sixth.
    grids = FIXED | {
        (float(q.scale * times), int(q.zero_point)) for q in activations for times in (1, 6)
    }
    for operator in read(file_of(network)).operators:
        for tensor in operator.outputs:
            if tensor.dtype == "INT8":
                assert (float(tensor.scale[0]), int(tensor.zero_point[0])) in grids


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("network", join_networks.CNNS)
def test_a_convolutional_network_is_integer_between_input_and_output(network: str) -> None:
    operators = read(file_of(network)).operators
    floats = [o for o in operators if any(t.dtype == "FLOAT32" for t in (*o.inputs, *o.outputs))]
    assert [operator.name for operator in floats] == ["QUANTIZE", "DEQUANTIZE"]


# What LiteRT computes


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("network", join_networks.NETWORKS)
def test_outputs_are_torch_s(network: str, runtime: str) -> None:
    x = join_networks.inputs_for(network, 8)
    unfusable = steps_apart(converted(network), file_of(network), x, runtime)
    # Kernels round twice where torch rounds once; layers behind can widen a step.
    assert np.mean(unfusable <= 3.001) >= 0.99


class Shared(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


@needs_tinynn
@needs_litert
def test_a_layer_that_is_called_twice_has_its_weight_twice() -> None:
    (x,) = samples((PICTURE,), 4)
    model = quantized_model(Shared(), x)
    data = written(model)
    weights = [o.inputs[1] for o in read(data).operators if o.name == "CONV_2D"]
    assert [weight.name for weight in weights] == ["layer.weight", "layer.weight_1"]
    assert steps_apart(model, data, x).max() <= 2.001


@needs_tinynn
@needs_litert
def test_a_layer_left_out_of_the_recipe_is_float() -> None:
    (x,) = samples((PICTURE,), 4)
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    model = quantized_model(network, x, Recipe(exclude=("0", "2")))
    data = written(model)
    kernels = [o for o in read(data).operators if o.name == "CONV_2D"]
    assert [kernel.inputs[1].dtype for kernel in kernels] == ["FLOAT32", "FLOAT32", "INT8"]
    assert steps_apart(model, data, x).max() <= 1.001


# Inputs and outputs


@needs_tinynn
@needs_litert
@pytest.mark.parametrize(("io", "moved"), [("int8", 0), ("uint8", 128)])
def test_integer_inputs_and_outputs_have_the_model_s_grids(io: str, moved: int) -> None:
    model, file = converted("unet"), read(file_of("unet", io))
    for tensor, key in ((file.inputs[0], "down1.0.0.input"), (file.outputs[0], "out.output_0_0")):
        qparams = model.tensors[key].qparams
        assert tensor.dtype == io.upper()
        assert (tensor.scale[0], tensor.zero_point[0]) == (
            qparams.scale,
            qparams.zero_point + moved,
        )
    assert not [o for o in file.operators if any(t.dtype == "FLOAT32" for t in o.inputs)]
    # The graph itself is int8; QUANTIZE moves uint8 integers by 128 at either end.
    assert file.counts["QUANTIZE"] == (2 if moved else 0)
    assert Counter(t.dtype for o in file.operators for t in o.outputs)["UINT8"] == moved // 128


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("io", ["int8", "uint8"])
def test_integer_files_compute_what_the_float_one_does(io: str) -> None:
    x = join_networks.inputs_for("unet", 4)
    litert: Any = importlib.import_module("ai_edge_litert.interpreter")
    interpreter = litert.Interpreter(model_content=file_of("unet", io))
    interpreter.allocate_tensors()
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    for sample, expected in zip(x.numpy(), run(file_of("unet"), x), strict=True):
        scale, zero_point = source["quantization"]
        picture = sample.transpose(1, 2, 0)[None]
        limits = np.iinfo(source["dtype"])
        integers = np.clip(np.rint(picture / scale) + zero_point, limits.min, limits.max)
        interpreter.set_tensor(source["index"], integers.astype(source["dtype"]))
        interpreter.invoke()
        scale, zero_point = result["quantization"]
        output = scale * (interpreter.get_tensor(result["index"]).astype(np.float32) - zero_point)
        np.testing.assert_allclose(output[0].transpose(2, 0, 1), expected, atol=1e-6)


@needs_tinynn
@needs_litert
@pytest.mark.parametrize(
    ("layout", "input_shape", "output_shape"),
    [("nhwc", (1, 16, 16, 3), (1, 16, 16, 2)), ("nchw", (1, 3, 16, 16), (1, 2, 16, 16))],
)
def test_pictures_have_the_layout_that_was_asked_for(
    layout: str, input_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> None:
    file = read(file_of("unet", "float", layout))
    assert file.inputs[0].shape == input_shape
    assert file.outputs[0].shape == output_shape


@needs_tinynn
@needs_litert
def test_several_inputs_and_outputs_keep_their_order() -> None:
    model = models.Nested()
    inputs = {"left": torch.randn(4, 6), "right": torch.randn(4, 6)}
    prepare(model, "int8")
    with torch.no_grad():
        model.train()(**inputs)
    quantized = convert(model.eval(), inputs)
    data = written(quantized)
    litert: Any = importlib.import_module("ai_edge_litert.interpreter")
    interpreter = litert.Interpreter(model_content=data)
    interpreter.allocate_tensors()
    expected = quantized.flat_outputs(quantized(**inputs))
    for i in range(4):
        for detail, value in zip(interpreter.get_input_details(), inputs.values(), strict=True):
            interpreter.set_tensor(detail["index"], value[i : i + 1].numpy())
        interpreter.invoke()
        for detail, value in zip(interpreter.get_output_details(), expected.values(), strict=True):
            np.testing.assert_allclose(
                interpreter.get_tensor(detail["index"])[0], value[i].numpy(), atol=0.05
            )


# What is refused


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.erf(self.conv(x))
        y = F.adaptive_avg_pool2d(self.head(y), 3)
        return torch.digamma(y)


@needs_tinynn
def test_everything_that_has_no_form_is_named_at_once() -> None:
    (x,) = samples((PICTURE,), 4)
    with pytest.raises(UnsupportedByTarget) as caught:
        written(quantized_model(Unsupported(), x))
    assert [(p.layer, p.reason.split(";")[0]) for p in caught.value.problems] == [
        ("conv (conv2d)", "an int8 kernel needs the scale of its output, which is not quantized"),
        ("erf", "aten.erf.default has no form in TinyNeuralNetwork's backend"),
        ("adaptive_avg_pool2d", "windows of unequal size: (8, 8) to [3, 3]"),
        ("digamma", "aten.digamma.default has no form in TinyNeuralNetwork's backend"),
    ]
    assert all('backend="litert"' in problem.remedy for problem in caught.value.problems)


@needs_tinynn
@pytest.mark.parametrize(
    ("recipe", "layer", "reason"),
    [
        (
            Recipe(joins=False, outputs=False),
            "0 (conv2d)",
            "needs the scale of its output, which is not quantized",
        ),
        ("amct", "0 (conv2d)", "needs the scale of its output"),
        (models.EVERY_LAYER["w4a4"], "0.input", "activations must have 8 bits"),
        ("a16w8", "0.input", "activations must have 8 bits"),
    ],
    ids=["inputs only", "amct", "w4a4", "a16w8"],
)
def test_recipes_that_int8_kernels_cannot_express_are_refused(
    recipe: str | Recipe, layer: str, reason: str
) -> None:
    (x,) = samples((PICTURE,), 4)
    model = quantized_model(nn.Sequential(nn.Conv2d(4, 2, 1)), x, recipe)
    with pytest.raises(UnsupportedByTarget, match=reason) as caught:
        written(model)
    assert caught.value.problems[0].layer == layer


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": nn.GRU(8, 4, 2, batch_first=True)})
        self.last = nn.LSTM(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder["rnn"](x)[0]
        return torch.erf(self.head(self.last(y)[0]))


@needs_tinynn
def test_recurrent_layers_are_refused_once_each_with_everything_else() -> None:
    (x,) = samples(((5, 8),), 4)
    with pytest.raises(UnsupportedByTarget) as caught:
        written(quantized_model(Recurrent(), x))
    reason = (
        "LSTM and GRU compute their gates in float; an int8 kernel needs the scale of every product"
    )
    assert [(p.layer, p.reason) for p in caught.value.problems] == [
        ("encoder.rnn", reason),
        ("last", reason),
        (
            "head (linear)",
            "an int8 kernel needs the scale of its output, which is not quantized; "
            "erf, which has no form here, reads it",
        ),
        ("erf", "aten.erf.default has no form in TinyNeuralNetwork's backend"),
    ]
    assert all('backend="litert"' in problem.remedy for problem in caught.value.problems)


class Divided(nn.Module):
    """No integer target knows a division, so what is divided stays float."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 / (x + 9)


@needs_tinynn
def test_an_integer_input_that_is_read_as_float_is_refused() -> None:
    (x,) = samples((ROWS,), 4)
    model = quantized_model(nn.Sequential(Divided(), nn.Linear(8, 2)), x)
    with pytest.raises(UnsupportedByTarget, match="an integer input must be quantized") as caught:
        written(model, "int8")
    assert [(p.layer, p.remedy) for p in caught.value.problems] == [("input", 'Use io="float"')]
