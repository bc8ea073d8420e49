"""From a converted model to the torch module that litert-torch turns into integers.

Every quantized tensor becomes a pair of ``quantized_decomposed`` operators with the model's own
scale and zero point; litert-torch writes them into the file unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_qat.ir.exported_program import writes_in_place
from lightning_qat.ir.ops import as_dequantize, as_fake_quantize
from lightning_qat.ir.quantized_model import QuantizedModel, QuantizedTensor
from lightning_qat.numerics.arithmetic import along_channels, dequantize
from lightning_qat_exporters.tflite.decompose.sample import sample_of
from lightning_qat_exporters.tflite.decompose.squeeze import name_squeezed_axes
from lightning_qat_exporters.tflite.litert.private import quantized_decomposed
from lightning_qat_exporters.tflite.litert.requantize import MARKS, Annotated, PlainQParams
from lightning_qat_exporters.tflite.litert.rewrite_ops import rewrite_ops


class Lowered(nn.Module):
    """A model that takes and returns its tensors one by one, images in the layout of the target.

    Args:
        model: The converted model; it is not changed.
        channels_last: 4-D inputs and outputs are NHWC instead of torch's NCHW.

    Attributes:
        example_inputs: One tensor per input, with a batch of 1 where the batch is dynamic.
        mark: LiteRT's name of the operator that keeps others apart, to be removed from the file.
    """

    # litert-torch writes this path into tensors' names: a file's bytes must not depend on where
    # the class is defined.
    __module__ = "lightning_qat_exporters._litert_lowering"

    def __init__(self, model: QuantizedModel, *, channels_last: bool) -> None:
        super().__init__()
        self.graph_module, self.mark = _rewritten(model)
        self.channels_last = channels_last
        leaves, self.spec = pytree.tree_flatten(model.example_inputs)
        self.leaves = leaves
        self.example_inputs = tuple(self._outwards(x) for x in sample_of(model).values())
        # The module of an exported program knows neither train() nor eval().
        self.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model's outputs, flattened, for its flattened inputs."""
        remaining = iter(tensors)
        leaves = [
            self._inwards(next(remaining)) if isinstance(leaf, Tensor) else leaf
            for leaf in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        outputs = pytree.tree_leaves(self.graph_module(*args, **kwargs))
        return tuple(self._outwards(y) for y in outputs if isinstance(y, Tensor))

    def _inwards(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self.channels_last and x.dim() == 4 else x

    def _outwards(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) if self.channels_last and x.dim() == 4 else x


def _rewritten(model: QuantizedModel) -> tuple[fx.GraphModule, str]:
    program = model.program
    if any(writes_in_place(node) for node in program.graph.nodes):
        program = program.run_decompositions({})
    module: Any = program.module(check_guards=False)
    _drop_copies(module.graph)
    _views_as_reshapes(module.graph)
    name_squeezed_axes(module.graph)
    calls = {node: as_fake_quantize(node) for node in module.graph.nodes}
    qparams = {
        node: PlainQParams.of(model.tensors[call.key].qparams)
        for node, call in calls.items()
        if call is not None
    }
    annotated = Annotated(module.graph, qparams)
    tensors = {**model.tensors, **rewrite_ops(annotated, model.tensors)}
    annotated.make_explicit()
    for node, numbers in qparams.items():
        call = as_fake_quantize(node)
        assert call is not None
        # A pair for each reader; the converter joins them. litert-torch turns pictures to NHWC for
        # some readers, and gave a Linear that shared the pair the turned one.
        for reader in list(node.users):
            with module.graph.inserting_before(node):
                reader.replace_input_with(node, _activation(module, call.x, numbers))
        module.graph.erase_node(node)
    weights: dict[str, fx.Node] = {}
    for node in list(module.graph.nodes):
        if (weight := as_dequantize(node)) is not None:
            key = weight.key
            if key not in weights:
                with module.graph.inserting_before(node):
                    weights[key] = _weight(module, tensors[key], len(weights))
            node.replace_all_uses_with(weights[key])
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    _drop_unread_buffers(module)
    module.recompile()
    return module, MARKS[annotated.mark]


def _drop_unread_buffers(module: fx.GraphModule) -> None:
    """Remove the scales and integers that pairs have taken over.

    ``torch.export`` carries every buffer of a module along, at a cost that grows with the square of
    their number.
    """
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_buffers() if name not in read]:
        owner, _, field = name.rpartition(".")
        delattr(module.get_submodule(owner), field)


def _drop_copies(graph: fx.Graph) -> None:
    """Remove what ``+=`` leaves of a functional graph: ``copy(target, source)`` is its source."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.copy.default:
            target, source = (argument.meta["val"] for argument in node.args)
            if target.shape == source.shape and target.dtype == source.dtype:
                node.replace_all_uses_with(node.args[1])
                graph.erase_node(node)
        elif node.target is torch.ops.aten.clone.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    # The old values of tensors that were written to have no readers now.
    graph.eliminate_dead_code()


def _views_as_reshapes(graph: fx.Graph) -> None:
    """Let tensors be laid out in memory as the converter likes; a file knows no strides.

    It refused ``view`` of what a transposed product or a picture in NHWC gave.
    """
    for node in graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default


def _activation(module: Any, x: fx.Node, qparams: PlainQParams) -> fx.Node:
    """A pair on all integers of the type; a clamp and a second pair where the grid has fewer.

    A file stores no bounds of a grid, so MINIMUM and MAXIMUM on integers keep them.
    """
    scale, zero_point, grid = qparams
    limits = torch.iinfo(grid.dtype)
    arguments = (scale, zero_point, limits.min, limits.max, grid.dtype)
    x = _pair(module, "per_tensor", x, arguments)
    if (grid.qmin, grid.qmax) == (limits.min, limits.max):
        return x
    low, high = ((bound - zero_point) * scale for bound in (grid.qmin, grid.qmax))
    x = module.graph.call_function(torch.ops.aten.clamp.default, (x, low, high))
    return _pair(module, "per_tensor", x, arguments)


def _weight(module: Any, tensor: QuantizedTensor, number: int) -> fx.Node:
    """A float constant in front of a pair: the only form in which litert-torch takes a weight.

    It finds the same integers again, because the constant holds multiples of the scale.
    """
    qparams, integers = tensor.qparams, tensor.integers
    assert integers is not None
    axis = qparams.axis
    scale = along_channels(qparams.scale, integers.shape, axis)
    real = _constant(module, f"weight_{number}", dequantize(integers, scale, torch.tensor(0)))
    bounds = (qparams.grid.qmin, qparams.grid.qmax, torch.int8)
    if axis is None:
        return _pair(module, "per_tensor", real, (float(qparams.scale), 0, *bounds))
    scales = _constant(module, f"scale_{number}", qparams.scale)
    zeros = _constant(module, f"zero_point_{number}", qparams.zero_point.to(torch.int64))
    return _pair(module, "per_channel", real, (scales, zeros, axis, *bounds))


def _pair(module: Any, kind: str, x: fx.Node, arguments: tuple[Any, ...]) -> fx.Node:
    operators = quantized_decomposed()
    for name in (f"quantize_{kind}", f"dequantize_{kind}"):
        x = module.graph.call_function(getattr(operators, name).default, (x, *arguments))
    return x


def _constant(module: Any, name: str, value: Tensor) -> fx.Node:
    module.register_buffer(f"lightning_qat_{name}", value)
    return module.graph.get_attr(f"lightning_qat_{name}")  # type: ignore[no-any-return]
