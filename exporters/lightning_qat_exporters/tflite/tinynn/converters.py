"""Convert our integer operators to TFLite operators inside TinyNeuralNetwork's converter.

``extended`` adds the operators of ``ops`` to its table and removes them again. They close these
gaps of its own table:

=====================================  ====================================================
its converter                          here
=====================================  ====================================================
per-channel ``linear``: TypeError      scales per row, ``quantized_dimension`` 0
transposed convolution per channel:    quantized_dimension 0 of the weight as it is stored
rejected by LiteRT
bias divided in float32                integers of ``arithmetic.quantize_bias``
small per-tensor scales times 10       scales as they are
mean and pools keep the input's scale  MEAN with the output's own scale
softmax, matmul, sub, gelu in float    SOFTMAX, BATCH_MATMUL, SUB, GELU in int8
gelu's ``approximate`` is inverted     as torch says
=====================================  ====================================================

Its optimizer merges neighbouring quantizations and activations, which changes numbers that were
trained (a value that is quantized and read as float loses its rounding): those rewrites are left
out. The lowering has fused whatever may be fused.
"""

# The package is on no index, so pyright does not find it.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSet
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tinynn.converter.operators import tflite as tfl
from tinynn.converter.operators.torch import OperatorConverter
from tinynn.converter.schemas.tflite.schema_generated import ActivationFunctionType, Padding

from lightning_qat_exporters.tflite.tinynn.ops import NAMESPACE
from lightning_qat_exporters.tflite.tinynn.private import (
    ordered_sets,
    registered,
    without_passes,
)

_ACTIVATIONS = {
    "none": ActivationFunctionType.NONE,
    "relu": ActivationFunctionType.RELU,
    "relu6": ActivationFunctionType.RELU6,
    "relu_n1_to_1": ActivationFunctionType.RELU_N1_TO_1,
}

_FUSING_BINARY = {"add": tfl.AddOperator, "sub": tfl.SubOperator, "mul": tfl.MulOperator}

_BINARY = {
    "matmul": tfl.BatchMatmulOperator,
    "minimum": tfl.MinimumOperator,
    "maximum": tfl.MaximumOperator,
}

_UNARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "none": tfl.QuantizeOperator,
    "relu": tfl.ReluOperator,
    "relu6": tfl.Relu6Operator,
    "relu_n1_to_1": tfl.ReluN1To1Operator,
    "sigmoid": tfl.LogisticOperator,
    "tanh": tfl.TanhOperator,
    "hardswish": tfl.HardSwishOperator,
    "gelu": lambda inputs, outputs: tfl.GeluOperator(inputs, outputs, approximate=False),
    "gelu_tanh": lambda inputs, outputs: tfl.GeluOperator(inputs, outputs, approximate=True),
    "elu": tfl.EluOperator,
}

_EXTREMES = {"amax": tfl.ReduceMaxOperator, "amin": tfl.ReduceMinOperator}

_LEFT_OUT = ("fuse_activation", "fuse_requantize", "fuse_dequant_quant_pass")
"""Passes of its optimizer that change numbers."""


class _IntegerOperator(OperatorConverter):  # type: ignore[misc] # it has no types
    """One call of an operator of ``ops``, on its way into the file's graph."""

    def parse(self, node: Any, attrs: Any, args: Any, graph_converter: Any) -> None:
        self.run(node)
        outputs = self.to_tfl_tensors(self.output_names, self.output_tensors)
        emit = _EMITTERS[node.kind()]
        for operator in emit(self, graph_converter, outputs):
            graph_converter.add_operator(operator)

    def input(self, index: int, graph: Any) -> Any:
        return self.find_or_create_input(index, graph)

    def constant(self, value: Any, name: str, graph: Any) -> Any:
        """A tensor of the file with a value; a layer that is called twice has it twice."""
        taken, number = name, 0
        while taken in graph.tensor_map:
            number += 1
            taken = f"{name}_{number}"
        return self.create_attr_tensor(value, name=taken)

    def weight_and_bias(
        self, key: str, graph: Any, order: tuple[int, ...], channels: int = 0
    ) -> list[Any]:
        """Weight and bias of a layer, the weight's axes in ``order``, ``channels`` the scales'."""
        x, weight, scale, bias = self.input_tensors[:4]
        zero_point: Any = [0] * len(scale) if scale.dim() else 0
        if bias is None:
            bias = torch.zeros(weight.shape[channels], dtype=torch.int32)
        stored = tfl.FakeQuantTensor(
            weight.permute(order).contiguous(),
            scale.tolist(),
            zero_point,
            order.index(channels) if scale.dim() else None,
        )
        bias_scale = scale.double() * x.q_scale()
        added = tfl.FakeQuantTensor(
            bias, bias_scale.tolist(), zero_point, 0 if scale.dim() else None
        )
        name = key.removesuffix("weight")
        return [self.constant(stored, key, graph), self.constant(added, f"{name}bias", graph)]

    def pad(self, operator: Any, padding: list[int]) -> Any:
        """A PAD in front of an operator on pictures."""
        source = operator.inputs[0]
        amounts = np.array([[0, 0], *([size, size] for size in padding), [0, 0]], dtype=np.int32)
        padded = self.create_transform_tensor(
            np.pad(source.tensor, amounts), quantization=source.quantization
        )
        operator.inputs[0] = padded
        return tfl.PadOperator([source, self.create_attr_tensor(amounts)], [padded])


def _convolve(call: _IntegerOperator, graph: Any, outputs: Any) -> list[Any]:
    weight = call.input_tensors[1]
    stride, padding, dilation, groups, activation, _, _, key = call.input_tensors[4:]
    depthwise = weight.shape[1] == 1 and groups > 1
    # TFLite keeps a kernel as (out, height, width, in), a depthwise one as (1, h, w, out).
    order = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
    inputs = [call.input(0, graph), *call.weight_and_bias(key, graph, order)]
    options = {
        "strideH": stride[0],
        "strideW": stride[1],
        "dilationHFactor": dilation[0],
        "dilationWFactor": dilation[1],
        "fusedActivationFunction": _ACTIVATIONS[activation],
        "padding": Padding.VALID,
    }
    if depthwise:
        multiplier = weight.shape[0] // groups
        operator = tfl.DepthwiseConv2dOperator(
            inputs, outputs, depthMultiplier=multiplier, **options
        )
    else:
        operator = tfl.Conv2dOperator(inputs, outputs, **options)
    operators: list[Any] = call.wrap_ops_with_nhwc_nchw_transposes([operator])
    if any(padding):
        # The optimizer turns this PAD into padding SAME where the two are the same.
        operators.insert(1, call.pad(operator, padding))
    return operators


def _transpose_convolve(call: _IntegerOperator, graph: Any, outputs: Any) -> list[Any]:
    stride, _, _, _, key = call.input_tensors[4:]
    weight, bias = call.weight_and_bias(key, graph, (1, 2, 3, 0), channels=1)
    operator = tfl.TransposeConvOperator(
        [None, weight, call.input(0, graph), bias],
        outputs,
        strideH=stride[0],
        strideW=stride[1],
        padding=Padding.VALID,
    )
    operators: list[Any] = call.wrap_ops_with_nhwc_nchw_transposes([operator], input_idx=2)
    size = np.array(operator.outputs[0].shape, dtype=np.int32)
    operator.inputs[0] = call.create_attr_tensor(size)
    return operators


def _linear(call: _IntegerOperator, graph: Any, outputs: Any) -> list[Any]:
    activation, _, _, key = call.input_tensors[4:]
    inputs = [call.input(0, graph), *call.weight_and_bias(key, graph, (0, 1))]
    return [
        tfl.FullyConnectedOperator(
            inputs,
            outputs,
            fusedActivationFunction=_ACTIVATIONS[activation],
            keepNumDims=len(outputs[0].shape) > 2,
        )
    ]


def _binary(call: _IntegerOperator, graph: Any, outputs: Any) -> list[Any]:
    function, activation = call.input_tensors[2:4]
    inputs = [call.input(0, graph), call.input(1, graph)]
    if function in _FUSING_BINARY:
        return [_FUSING_BINARY[function](inputs, outputs, _ACTIVATIONS[activation])]
    return [_BINARY[function](inputs, outputs)]


def _unary(call: _IntegerOperator, graph: Any, outputs: Any) -> list[Any]:
    return [_UNARY[call.input_tensors[1]]([call.input(0, graph)], outputs)]


def _leaky_relu(call: _IntegerOperator, graph: Any, outputs: Any) -> list[Any]:
    return [tfl.LeakyReluOperator([call.input(0, graph)], outputs, call.input_tensors[1])]


def _softmax(call: _IntegerOperator, graph: Any, outputs: Any) -> list[Any]:
    operator = tfl.SoftmaxOperator([call.input(0, graph)], outputs, 1.0)
    wrapped: list[Any] = call.wrap_ops_with_last_dim_transposes([operator], call.input_tensors[1])
    return wrapped


def _mean(call: _IntegerOperator, graph: Any, outputs: Any) -> list[Any]:
    return _reduce(call, graph, outputs, tfl.MeanOperator)


def _extreme(call: _IntegerOperator, graph: Any, outputs: Any) -> list[Any]:
    return _reduce(call, graph, outputs, _EXTREMES[call.input_tensors[3]])


def _reduce(call: _IntegerOperator, graph: Any, outputs: Any, make: Any) -> list[Any]:
    x, axes, keepdim = call.input_tensors[:3]
    if x.dim() == 4 and sorted(axes) == [2, 3]:
        # Where the converter keeps pictures, height and width are axes 1 and 2.
        if not keepdim:
            return _reduce_picture(call, graph, outputs, make)
        dims = call.create_attr_tensor(np.array([1, 2], dtype=np.int32))
        operator = make([call.input(0, graph), dims], outputs, True)
        wrapped: list[Any] = call.wrap_ops_with_nhwc_nchw_transposes([operator])
        return wrapped
    dims = call.create_attr_tensor(np.array(axes, dtype=np.int32))
    return [make([call.input(0, graph), dims], outputs, keepdim)]


def _reduce_picture(call: _IntegerOperator, graph: Any, outputs: Any, make: Any) -> list[Any]:
    """``(n, c, h, w)`` to ``(n, c)``: a transpose in front, none behind."""
    source = call.input(0, graph)
    order = np.array([0, 2, 3, 1], dtype=np.int32)
    turned = call.create_transform_tensor(
        np.transpose(source.tensor, order), quantization=source.quantization
    )
    transpose = tfl.TransposeOperator([source, call.create_attr_tensor(order)], [turned])
    transpose.extra_hints["direction"] = "up"
    dims = call.create_attr_tensor(np.array([1, 2], dtype=np.int32))
    return [transpose, make([turned, dims], outputs, False)]


def _average_pool(call: _IntegerOperator, graph: Any, outputs: Any) -> list[Any]:
    kernel, stride, padding, count_padding = call.input_tensors[1:5]
    padded = any(padding)
    # Padding SAME is not counted by the kernel; padding that counts is a PAD in front.
    pool = tfl.AveragePool2dOperator(
        [call.input(0, graph)],
        outputs,
        padding=Padding.SAME if padded and not count_padding else Padding.VALID,
        strideH=stride[0],
        strideW=stride[1],
        filterHeight=kernel[0],
        filterWidth=kernel[1],
    )
    operators: list[Any] = call.wrap_ops_with_nhwc_nchw_transposes([pool])
    if padded and count_padding:
        operators.insert(1, call.pad(pool, padding))
    return operators


_EMITTERS: Mapping[str, Callable[[_IntegerOperator, Any, Any], list[Any]]] = {
    f"{NAMESPACE}::convolve": _convolve,
    f"{NAMESPACE}::transpose_convolve": _transpose_convolve,
    f"{NAMESPACE}::linear": _linear,
    f"{NAMESPACE}::binary": _binary,
    f"{NAMESPACE}::unary": _unary,
    f"{NAMESPACE}::leaky_relu": _leaky_relu,
    f"{NAMESPACE}::softmax": _softmax,
    f"{NAMESPACE}::mean": _mean,
    f"{NAMESPACE}::extreme": _extreme,
    f"{NAMESPACE}::average_pool": _average_pool,
}


class _OrderedSet(MutableSet[Any]):
    """A set that is read in the order it was filled."""

    def __init__(self, values: Iterable[Any] = ()) -> None:
        self._values = dict.fromkeys(values)

    def __contains__(self, value: object) -> bool:
        return value in self._values

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: Any) -> None:
        self._values[value] = None

    def discard(self, value: Any) -> None:
        self._values.pop(value, None)

    def intersection(self, other: Iterable[Any]) -> _OrderedSet:
        return _OrderedSet(value for value in other if value in self)


@contextmanager
def extended() -> Iterator[None]:
    """TinyNeuralNetwork's converter with our operators and without the passes in ``_LEFT_OUT``."""
    converters = dict.fromkeys(_EMITTERS, _IntegerOperator)
    with registered(converters), without_passes(*_LEFT_OUT), ordered_sets(_OrderedSet):
        yield
