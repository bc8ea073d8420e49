"""The quantized activations inside a ``.tflite`` file, from LiteRT's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_qat.export.protocol import Array
from lightning_qat.export.trace import Trace, TracedTensor
from lightning_qat_exporters.tflite.flatbuffer.file import TFLiteFile, pack, unpack, view
from lightning_qat_exporters.tflite.run import (
    dequantized,
    interpreter,
    joined_outputs,
    quantized,
    split_samples,
)


def trace_tflite(
    content: bytes, kernels: str, inputs: Mapping[str, Array], given: Mapping[str, Array]
) -> Trace:
    """See ``Traceable.trace``; the first axis of a tensor's values counts the runs of the file.

    Args:
        content: The file.
        kernels: One of the values of ``run.RUNTIMES``.
        inputs: Real values by input name, in torch's layout.
        given: Real values by the name of a tensor, in the file's layout, one row for each run.
    """
    model = unpack(content)
    file = view(model)
    shown = _activations(file)
    stand_ins = _stand_ins(model, {n: i for n, i in shown.items() if n in given})
    graph = model.subgraphs[0]
    graph.outputs = [*dict.fromkeys([*map(int, graph.outputs), *shown.values()])]
    runner = interpreter(pack(model), kernels)
    values: dict[str, list[Array]] = {name: [] for name in shown}
    outputs: list[dict[str, Array]] = []
    for number, sample in enumerate(split_samples(file, inputs)):
        for name, value in sample.items():
            runner.set_tensor(file.inputs[name], value)
        for name, place in stand_ins.items():
            runner.set_tensor(place, quantized(given[name][number], file.tensors[shown[name]]))
        runner.invoke()
        outputs.append({name: runner.get_tensor(index) for name, index in file.outputs.items()})
        for name, index in shown.items():
            values[name].append(runner.get_tensor(index))
    return Trace(
        tuple(_traced(file, name, index, values[name]) for name, index in shown.items()),
        joined_outputs(file, outputs),
    )


def _activations(file: TFLiteFile) -> dict[str, int]:
    """The computed tensors of one scale, by unique names, in the order of execution."""
    ordered = [*file.inputs.values(), *(i for op in file.operators for i in op.outputs)]
    found = {}
    for index in dict.fromkeys(ordered):
        tensor = file.tensors[index]
        if tensor.data is None and tensor.scale.size == 1:
            found[f"{index} {tensor.name}"] = index
    return found


def _stand_ins(model: Any, replaced: Mapping[str, int]) -> dict[str, int]:
    """Add an input for each tensor and let the operators that read the tensor read the input."""
    graph = model.subgraphs[0]
    places = {}
    for name, index in replaced.items():
        twin = copy.copy(graph.tensors[index])
        twin.name = twin.name + b"_given"
        graph.tensors.append(twin)
        places[name] = len(graph.tensors) - 1
    new = {index: places[name] for name, index in replaced.items()}
    for operator in graph.operators:
        operator.inputs = [new.get(int(index), int(index)) for index in operator.inputs]
    graph.inputs = [*map(int, graph.inputs), *places.values()]
    return places


def _traced(file: TFLiteFile, name: str, index: int, values: list[Array]) -> TracedTensor:
    tensor = file.tensors[index]
    shift = 128 if tensor.type == "UINT8" else 0
    real = np.stack([dequantized(value, tensor) for value in values])
    return TracedTensor(name, float(tensor.scale[0]), int(tensor.zero_point[0]) - shift, real)
