"""From a converted model to the torch module that litert-torch turns into integers.

Every quantized tensor becomes a pair of ``quantized_decomposed`` operators with the model's own
scale and zero point; litert-torch writes them into the file unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_qat.arithmetic import along_axis, dequantize
from lightning_qat.quantized_model import QuantizedModel, QuantizedTensor


class Lowered(nn.Module):
    """A model that takes and returns its tensors one by one, images in the layout of the target.

    Args:
        model: The neutral description; left as it is.
        channels_last: 4-D inputs and outputs are NHWC instead of torch's NCHW.

    Attributes:
        example_inputs: One tensor per input, with a batch of 1 where the batch is dynamic.
    """

    def __init__(self, model: QuantizedModel, *, channels_last: bool) -> None:
        super().__init__()
        self.graph_module = _rewritten(model)
        self.channels_last = channels_last
        leaves, self.spec = pytree.tree_flatten(model.example_inputs)
        self.leaves = leaves
        self.example_inputs = tuple(self._outwards(x) for x in _smallest_batch(model))
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


def _smallest_batch(model: QuantizedModel) -> list[Tensor]:
    """The example inputs; one sample of each whose first dimension is dynamic."""
    args, kwargs = model.example_inputs
    values = model.flat_inputs(args, kwargs)
    shapes = {
        node.name: node.meta["val"].shape
        for node in model.program.graph.nodes
        if node.name in values
    }
    return [
        x[:1] if x.dim() and isinstance(shapes[name][0], torch.SymInt) else x
        for name, x in values.items()
    ]


def _rewritten(model: QuantizedModel) -> fx.GraphModule:
    # The import registers torch.ops.quantized_decomposed.
    import torch.ao.quantization.fx._decomposed

    module: Any = model.program.module(check_guards=False)
    weights: dict[str, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.target is torch.ops.lightning_qat.fake_quantize.default:
            with module.graph.inserting_before(node):
                new = _activation(module, node.args[0], model.tensors[node.args[5]])
        elif node.target is torch.ops.lightning_qat.dequantize.default:
            key = node.args[5]
            if key not in weights:
                with module.graph.inserting_before(node):
                    weights[key] = _weight(module, model.tensors[key], len(weights))
            new = weights[key]
        else:
            continue
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module  # type: ignore[no-any-return]


def _activation(module: Any, x: fx.Node, tensor: QuantizedTensor) -> fx.Node:
    """A pair on all integers of the type; a clamp and a second pair where the grid has fewer.

    A file stores no bounds of a grid, so MINIMUM and MAXIMUM on integers keep them.
    """
    scale, zero_point = float(tensor.qparams.scale), int(tensor.qparams.zero_point)
    grid = tensor.qparams.grid
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
    scale = along_axis(qparams.scale, integers.dim(), axis)
    real = _constant(module, f"weight_{number}", dequantize(integers, scale, torch.tensor(0)))
    bounds = (qparams.grid.qmin, qparams.grid.qmax, torch.int8)
    if axis is None:
        return _pair(module, "per_tensor", real, (float(qparams.scale), 0, *bounds))
    scales = _constant(module, f"scale_{number}", qparams.scale)
    zeros = _constant(module, f"zero_point_{number}", qparams.zero_point.to(torch.int64))
    return _pair(module, "per_channel", real, (scales, zeros, axis, *bounds))


def _pair(module: Any, kind: str, x: fx.Node, arguments: tuple[Any, ...]) -> fx.Node:
    operators = torch.ops.quantized_decomposed
    for name in (f"quantize_{kind}", f"dequantize_{kind}"):
        x = module.graph.call_function(getattr(operators, name).default, (x, *arguments))
    return x


def _constant(module: Any, name: str, value: Tensor) -> fx.Node:
    module.register_buffer(f"lightning_qat_{name}", value)
    return module.graph.get_attr(f"lightning_qat_{name}")  # type: ignore[no-any-return]
