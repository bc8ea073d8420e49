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
from torch import Tensor, nn

from lightning_qat.arithmetic import quantize_bias
from lightning_qat.convert import convert
from lightning_qat.export import MissingDependency
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
    """A function as a network, so that its operator stands alone between two quantizations."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


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


PICTURE, ROWS = (2, 4, 8, 8), (2, 6, 8)
"""Shapes of samples."""
