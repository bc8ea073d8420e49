"""TFLite through TinyNeuralNetwork: the file's numbers, and what LiteRT computes with it."""

import functools
import importlib
import importlib.util
import sys
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

from lightning_qat.arithmetic import quantize_bias
from lightning_qat.convert import convert
from lightning_qat.export import MissingDependency, UnsupportedByTarget
from lightning_qat.prepare import prepare
from lightning_qat.quantized_model import QuantizedModel
from lightning_qat.recipe import Recipe
from lightning_qat_exporters import _tinynn
from tests import join_networks

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
    apart: Array = np.abs(run(data, x, runtime) - expected) / model.output_steps[name]
    return apart


# Networks


@functools.cache
def converted(network: str, recipe: str = "int8") -> QuantizedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = join_networks.inputs_for(network)
        model = join_networks.NETWORKS[network][0]()
        prepare(model, recipe, x)
        return convert(join_networks.train_steps(model, x), x)


@functools.cache
def file_of(network: str, io: str = "float", layout: str = "nhwc") -> bytes:
    return _tinynn.convert(converted(network), io=io, layout=layout)


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
def without_tinynn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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
def test_its_absence_is_told_with_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinynn", None)
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


FIXED = {(1 / 256, -128), (1 / 128, 0), (float(np.float32(6 / 255)), -128)}
"""Grids of kernels whose results have one by TFLite's specification, and of a clamp to 0 .. 6."""


@needs_tinynn
@needs_litert
@pytest.mark.parametrize("network", join_networks.NETWORKS)
def test_every_activation_lies_on_a_grid_of_the_model(network: str) -> None:
    activations = [t.qparams for t in converted(network).tensors.values() if t.kind != "weight"]
    grids = {(float(q.scale), int(q.zero_point)) for q in activations} | FIXED
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
    apart = steps_apart(converted(network), file_of(network), x, runtime)
    # Kernels round twice where torch rounds once; layers behind can widen a step.
    assert np.mean(apart <= 3.001) >= 0.99


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
    data = _tinynn.convert(model, io="float", layout="nhwc")
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
    data = _tinynn.convert(model, io="float", layout="nhwc")
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
    data = _tinynn.convert(model, io="float", layout="nhwc")
    assert [o.name for o in read(data).operators if is_float(o)]
    apart = steps_apart(model, data, list(samples(shapes, 8)))
    assert np.mean(apart > 0.5) < 0.03
    assert apart.max() <= 1.001
