"""What the tests of convert share."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.layers import QATLayer


def one_step(model: nn.Module) -> float:
    """What one flipped rounding in the input of every layer can move the output by.

    One step times the layer's largest weight, summed over the layers, and twice that for what
    later layers of these networks make of it.
    """
    layers = [m for m in model.modules() if isinstance(m, QATLayer)]
    steps = [layer.input_quantizer.qparams().scale for layer in layers]  # type: ignore[union-attr]
    weights = [layer.weight.detach().abs().max() for layer in layers]
    return 2 * sum(float(s * w) for s, w in zip(steps, weights, strict=True))


def operators(quantized: QuantizedModel) -> list[str]:
    nodes = quantized.program.graph.nodes
    return [str(n.target).split(".")[-2] for n in nodes if n.op == "call_function"]


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        k: v.clone() if isinstance(v, Tensor) else dict(v) for k, v in model.state_dict().items()
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items()
    )
