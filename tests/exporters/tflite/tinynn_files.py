"""Models, files and measures that the tests of the tinynn backend share."""

import functools
import importlib.util
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.protocol import MissingDependency
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from lightning_qat_exporters.tflite.flatbuffer.file import pack
from lightning_qat_exporters.tflite.tinynn import backend as _tinynn
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


# One operator at a time

PICTURE, ROWS = (4, 8, 8), (6, 8)


def samples(shapes: tuple[tuple[int, ...], ...], count: int) -> tuple[Tensor, ...]:
    return tuple(1.5 * torch.randn(count, *shape) for shape in shapes)
