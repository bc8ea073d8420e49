"""TFLite through TinyNeuralNetwork: the file's numbers, and what LiteRT computes with it."""

import functools
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.protocol import MissingDependency, UnsupportedByTarget
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.arithmetic import quantize_bias
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import WeightSpec
from lightning_qat_exporters.tflite.flatbuffer.file import pack
from lightning_qat_exporters.tflite.tinynn import backend as _tinynn
from tests import join_networks, models
from tests.exporters.litert_operators import assert_as_defined

Array = np.ndarray[Any, Any]


def _tinynn_missing() -> str:
    try:
        _tinynn.check_available()
    except MissingDependency as error:
        return str(error)
    return ""


NO_TINYNN = _tinynn_missing()
needs_tinynn = pytest.mark.skipif(bool(NO_TINYNN), reason=NO_TINYNN)
needs_litert = pytest.mark.skipif(
    importlib.util.find_spec("ai_edge_litert") is None,
    reason="reading and running TFLite files needs ai-edge-litert: pip install ai-edge-litert",
)

RUNTIMES = {
    "xnnpack": "AUTO",
    "builtin": "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
    "reference": "BUILTIN_REF",
}
"""Kernels to LiteRT's name of the resolver that selects them."""


# Reading and running a file


@dataclass
class FileTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: Array
    zero_point: Array
    axis: int
    values: Array | None


@dataclass
class FileOperator:
    name: str
    inputs: list[FileTensor]
    outputs: list[FileTensor]
    options: Any


@dataclass
class File:
    tensors: dict[str, FileTensor]
    operators: list[FileOperator]
    inputs: list[FileTensor]
    outputs: list[FileTensor]

    @property
    def counts(self) -> Counter[str]:
        return Counter(operator.name for operator in self.operators)


def read(data: bytes) -> File:
    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    types = {value: name for name, value in vars(schema.TensorType).items()}
    operators = {value: name for name, value in vars(schema.BuiltinOperator).items()}
    (graph,) = model.subgraphs
    tensors = []
    for tensor in graph.tensors:
        stored = model.buffers[tensor.buffer].data
        dtype, shape = types[tensor.type], tuple(int(n) for n in tensor.shape)
        values = None
        if stored is not None and len(stored):
            values = np.frombuffer(bytes(stored), dtype.lower()).reshape(shape)
        q = tensor.quantization
        none: Array = np.zeros(0)
        scale, zero_point = (none, none) if q is None or q.scale is None else (q.scale, q.zeroPoint)
        axis = 0 if q is None else int(q.quantizedDimension)
        name = tensor.name.decode()
        tensors.append(FileTensor(name, dtype, shape, scale, zero_point, axis, values))

    def name_of(code: Any) -> str:
        return operators[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def pick(indices: Any) -> list[FileTensor]:
        return [tensors[i] for i in indices]

    return File(
        {tensor.name: tensor for tensor in tensors},
        [
            FileOperator(
                name_of(model.operatorCodes[op.opcodeIndex]),
                pick(op.inputs),
                pick(op.outputs),
                op.builtinOptions,
            )
            for op in graph.operators
        ],
        pick(graph.inputs),
        pick(graph.outputs),
    )


def run(data: bytes, x: Tensor | list[Tensor], runtime: str = "xnnpack") -> Array:
    """The first output for every sample; pictures go in and come out as torch has them."""
    litert: Any = importlib.import_module("ai_edge_litert.interpreter")
    resolver = getattr(litert.OpResolverType, RUNTIMES[runtime])
    interpreter = litert.Interpreter(model_content=data, experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    results = []
    inputs = [x] if isinstance(x, Tensor) else x
    for i in range(len(inputs[0])):
        for detail, value in zip(interpreter.get_input_details(), inputs, strict=True):
            sample = value[i : i + 1].numpy()
            if sample.ndim == 4:
                sample = np.ascontiguousarray(sample.transpose(0, 2, 3, 1))
            interpreter.set_tensor(detail["index"], sample)
        interpreter.invoke()
        output = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        results.append(output.transpose(0, 3, 1, 2) if output.ndim == 4 else output)
    return np.concatenate(results)


def steps_apart(
    model: QuantizedModel, data: bytes, x: Tensor | list[Tensor], runtime: str = "xnnpack"
) -> Array:
    """How far LiteRT is from torch, element by element, in steps of the first output."""
    inputs = [x] if isinstance(x, Tensor) else x
    expected = next(iter(model.flat_outputs(model(*inputs)).values())).numpy()
    name = model.output_names[0]
    unfusable: Array = np.abs(run(data, x, runtime) - expected) / model.output_steps[name]
    return unfusable


# Networks


@functools.cache
def converted(network: str, recipe: str = "int8") -> QuantizedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = join_networks.inputs_for(network)
        model = join_networks.NETWORKS[network][0]()
        prepare(model, recipe, x)
        return convert(join_networks.train_steps(model, x), x)


def written(model: QuantizedModel, io: str = "float", layout: str = "nhwc") -> bytes:
    return pack(_tinynn.convert(model, io=io, layout=layout))


@functools.cache
def file_of(network: str, io: str = "float", layout: str = "nhwc") -> bytes:
    return written(converted(network), io, layout)


class Function(nn.Module):
    """A function as a network, beside the layer that every network must have."""

    def __init__(self, function: Callable[..., Any], width: int = 8) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(width, 2)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        inputs = (x,) if y is None else (x, y)
        return self.function(*inputs), self.layer(x)


def quantized_model(
    model: nn.Module, inputs: Tensor | tuple[Tensor, ...], recipe: str | Recipe = "int8"
) -> QuantizedModel:
    prepare(model, recipe)
    model.train()
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    with torch.no_grad():
        for _ in range(2):
            model(*inputs)
    return convert(model.eval(), inputs)


# Whether TinyNeuralNetwork is there


@pytest.fixture
def without_tinynn() -> Iterator[None]:
    """A process that has not imported anything called tinynn, for the time of a test."""
    loaded = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "tinynn"}
    for name in loaded:
        del sys.modules[name]
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "tinynn"]:
        del sys.modules[name]
    sys.modules.update(loaded)


def package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.usefixtures("without_tinynn")
def test_its_absence_is_told_with_where_to_get_it() -> None:
    # Not with monkeypatch, which would tidy up after the fixture has put things back.
    sys.modules["tinynn"] = None  # type: ignore[assignment] # makes the import fail
    with pytest.raises(MissingDependency, match="is not installed") as caught:
        _tinynn.check_available()
    assert "git+https://github.com/alibaba/TinyNeuralNetwork" in str(caught.value)
    assert 'backend="litert"' in str(caught.value)


@pytest.mark.usefixtures("without_tinynn")
@pytest.mark.parametrize(
    "files",
    [{"tinynn/__init__.py": ""}, {"tinynn/__init__.py": "", "tinynn/converter/__init__.py": ""}],
    ids=["no converter", "another converter"],
)
def test_another_package_of_its_name_is_recognised(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, files)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match="is not TinyNeuralNetwork") as caught:
        _tinynn.check_available()
    assert "pip uninstall tinynn" in str(caught.value)


@pytest.mark.usefixtures("without_tinynn")
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_igraph", "ModuleNotFoundError: No module named 'no_such_igraph'"),
        ("raise RuntimeError('operator nms')", "RuntimeError: operator nms"),
    ],
)
def test_an_import_that_fails_is_told_with_its_reason(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, {"tinynn/__init__.py": "", "tinynn/converter/__init__.py": code})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match="cannot be imported") as caught:
        _tinynn.check_available()
    assert reason in str(caught.value)


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


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("network", join_networks.CNNS)
def test_every_operator_computes_what_its_definition_says_of_its_own_inputs(network: str) -> None:
    assert_as_defined(file_of(network), join_networks.inputs_for(network, 8))


# One operator at a time

PICTURE, ROWS = (4, 8, 8), (6, 8)

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
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), (PICTURE,), "RESIZE_NEAREST_NEIGHBOR"),
    "bilinear": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        (PICTURE,),
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


def samples(shapes: tuple[tuple[int, ...], ...], count: int) -> tuple[Tensor, ...]:
    return tuple(1.5 * torch.randn(count, *shape) for shape in shapes)


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
    "max pool": (lambda x: F.max_pool2d(x, 2), {"MAX_POOL_2D"}),
    "max pool, padded": (lambda x: F.max_pool2d(x, 3, 2, 1), {"PADV2", "MAX_POOL_2D"}),
    "max pool, relu": (lambda x: F.relu(F.max_pool2d(x, 2)), {"MAX_POOL_2D"}),
    "adaptive max pool": (lambda x: F.adaptive_max_pool2d(x, 2), {"MAX_POOL_2D"}),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1)), {"PAD"}),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), {"MIRROR_PAD"}),
    "flatten": (lambda x: x.flatten(1), {"RESHAPE"}),
    "permute": (lambda x: x.permute(0, 2, 3, 1), set()),
    "transpose": (lambda x: x.transpose(1, 2).contiguous(), set()),
    "unsqueeze": (lambda x: x.unsqueeze(1), {"RESHAPE"}),
    "slice": (lambda x: x[:, :, 1:-1, ::2], {"STRIDED_SLICE"}),
    "narrow": (lambda x: x.narrow(1, 1, 2), {"SLICE"}),
    "select": (lambda x: x[:, 0], {"GATHER", "RESHAPE"}),
    "index select": (lambda x: x.index_select(1, torch.tensor([0, 2])), {"GATHER"}),
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


CONVERT = """
import logging
import sys
from pathlib import Path
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.tflite.flatbuffer.file import pack
from lightning_qat_exporters.tflite.tinynn import backend
model = QuantizedModel.load(sys.argv[1])
Path(sys.argv[2]).write_bytes(pack(backend.convert(model, io="float", layout="nhwc")))
assert logging.getLogger().handlers == []
"""
"""A process that converts a saved model."""


@needs_tinynn
def test_the_same_model_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    # Sets of strings have another order there.
    converted("mobilenet_v3_block").save(tmp_path / "model.pt2")
    command = [sys.executable, "-c", CONVERT, tmp_path / "model.pt2", tmp_path / "model.tflite"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (tmp_path / "model.tflite").read_bytes() == file_of("mobilenet_v3_block")


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
            "an int8 kernel needs the scale of its output, which is not quantized",
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


# The process


@dataclass
class ProcessState:
    """What a library may leave behind."""

    handlers: list[logging.Handler]
    propagates: bool
    dtype: torch.dtype
    engine: str
    filters: list[Any]
    directory: list[str]


def process_state() -> ProcessState:
    return ProcessState(
        list(logging.getLogger().handlers),
        logging.getLogger("tinynn").propagate,
        torch.get_default_dtype(),
        torch.backends.quantized.engine,
        list(warnings.filters),
        sorted(os.listdir()),
    )


@needs_tinynn
@pytest.mark.parametrize("succeeds", [True, False], ids=["converted", "failed"])
def test_nothing_is_left_in_the_process(
    succeeds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from tinynn.converter.operators.optimize import GraphOptimizer
    from tinynn.converter.operators.torch import OPERATOR_CONVERTER_DICT

    model = converted("dense_block")
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float64)
    table, passes = dict(OPERATOR_CONVERTER_DICT), dict(vars(GraphOptimizer))
    before = process_state()
    if succeeds:
        written(model)
    else:

        def fail(*_: Any) -> None:
            raise RuntimeError("in the middle")

        monkeypatch.setattr("tinynn.converter.base.OPVersioner.process", fail)
        with pytest.raises(UnsupportedByTarget, match="converter failed: RuntimeError: in the mid"):
            written(model)
    assert process_state() == before
    assert OPERATOR_CONVERTER_DICT == table
    assert dict(vars(GraphOptimizer)) == passes
    assert capfd.readouterr() == ("", "")


@needs_tinynn
def test_the_first_conversion_of_a_process_is_silent(tmp_path: Path) -> None:
    converted("dense_block").save(tmp_path / "model.pt2")
    # Only torch's own reading of a saved program warns.
    options = ["-W", "error", "-W", "ignore::FutureWarning"]
    command = [*options, "-c", CONVERT, tmp_path / "model.pt2", tmp_path / "model.tflite"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_tinynn
def test_the_model_is_untouched() -> None:
    model, x = converted("unet"), join_networks.inputs_for("unet")
    before = {**model.program.state_dict, **model.program.constants}
    copies = {name: value.clone() for name, value in before.items()}
    output, code = model(x), model.program.graph_module.code
    written(model, "uint8")
    after = {**model.program.state_dict, **model.program.constants}
    assert all(torch.equal(after[name], value) for name, value in copies.items())
    assert model.program.graph_module.code == code
    assert torch.equal(model(x), output)
