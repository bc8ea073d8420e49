"""How many kernels Inductor makes of a quantized model: quantizers fuse with their neighbours.

The graphs are lowered and scheduled, not compiled: what the scheduler has fused is one launch.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.training.range_sync import activation_quantizers

# Inductor's own imports.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")

LEARNED = {"activation": {"quantizer": "learned"}, "weight": {"quantizer": "learned"}}


SHAPE = (2, 3, 16, 16)


class Residual(nn.Module):
    """A stem, a block with batch norm and an addition, a head; takes (batch, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = (
            nn.Conv2d(given, 8, 3, padding=1, bias=False) for given in (3, 8, 8)
        )
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.bn1(self.conv1(x)).relu()
        x = (self.bn2(self.conv2(y)) + x).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))


def scheduled(graph: Any, inputs: Any) -> int:
    """The kernels of a graph besides those of libraries."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    fake_mode = next(value.fake_mode for value in values if hasattr(value, "fake_mode"))
    with V.set_fake_mode(fake_mode), DebugContext(), torch.no_grad():
        post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=values)
        with V.set_graph_handler(lowering):
            lowering.run(*values)
            lowering._update_scheduler()
            assert lowering.scheduler is not None
            return sum(not node.is_extern() for node in lowering.scheduler.nodes)


def kernels(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Those of the forward and of the backward."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    counts: list[int] = []

    def count(graph: Any, inputs: Any) -> Callable[..., Any]:
        counts.append(scheduled(copy.deepcopy(graph), inputs))
        boxed: Callable[..., Any] = make_boxed_func(graph.forward)
        return boxed

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=count,
        bw_compiler=count,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compile(model, backend=backend, fullgraph=True)(x).square().sum().backward()
    forward, backward = counts
    return forward, backward


@functools.cache
def in_float(net: Callable[[], nn.Module]) -> tuple[int, int]:
    """Of a network that is not quantized, one count for all states."""
    return kernels(net().train(), torch.randn(SHAPE))


# The minimum and the maximum of a tensor are reductions in stages on CPUs.
STATES = {"frozen": (0.5, 0.5), "observing": (5, 0.5), "learned": (1, 2)}


# The residual network has all of what two convolutions have, but a bias and no batch norm.
@pytest.mark.xdist_group("kernels of Inductor")
@pytest.mark.parametrize(
    ("net", "state"), [*((Residual, state) for state in STATES), (convolutions, "observing")]
)
def test_quantizers_fuse_with_what_is_around_them(net: Callable[[], nn.Module], state: str) -> None:
    """At most so many more kernels per activation quantizer, besides one per weight."""
    extra_forward, extra_backward = STATES[state]
    x = torch.randn(SHAPE)
    model = net().train()
    prepare(model, LEARNED if state == "learned" else "int8", x)
    model(x)
    quantizers = activation_quantizers(model).values()
    for quantizer in quantizers:
        quantizer.deferred, quantizer.observing = True, state == "observing"
    weights = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    forward, backward = kernels(model, x)
    assert forward - in_float(net)[0] - weights <= extra_forward * len(quantizers)
    assert backward - in_float(net)[1] - weights <= extra_backward * len(quantizers)
