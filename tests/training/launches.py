"""Count what a GPU would have to launch, on the meta device, where nothing runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qat import prepare
from lightning_qat.numerics.gpu.launch import Launch, count_launches
from lightning_qat.quantizers.switches import switch
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.training.phases import set_compact
from lightning_qat.training.range_sync import activation_quantizers

_LAUNCHES_NOTHING = frozenset(
    "view _unsafe_view t transpose permute expand detach alias as_strided slice select unbind "
    "split unsqueeze squeeze reshape unflatten unfold split_with_sizes lift_fresh empty empty_like "
    "empty_strided new_empty new_empty_strided".split()
)


class Calls(TorchDispatchMode):
    """Counts operations of torch that are no views and no allocations: each is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in _LAUNCHES_NOTHING:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.names.values())


class Step(NamedTuple):
    """What one training step launches: kernels of ours, and operations of torch."""

    forward: int
    backward: int
    kernels: list[Launch]


def step(model: nn.Module, x: Tensor, *, triton: bool) -> Step:
    """A forward and a backward on the meta device."""
    for parameter in model.parameters():
        parameter.grad = None
    forward, backward = Calls(), Calls()
    with count_launches() as launches:
        if not triton:
            return _without_kernels(model, x)
        with forward:
            y = model(x)
        of_forward = len(launches)
        with backward:
            y.backward(torch.empty_like(y))
        kernels = list(launches)
    return Step(forward.total + of_forward, backward.total + len(kernels) - of_forward, kernels)


def _without_kernels(model: nn.Module, x: Tensor) -> Step:
    from lightning_qat.numerics.gpu import launch

    counting, launch._COUNTING.launches = launch._COUNTING.launches, None
    try:
        forward, backward = Calls(), Calls()
        with forward:
            y = model(x)
        with backward:
            y.backward(torch.empty_like(y))
        return Step(forward.total, backward.total, [])
    finally:
        launch._COUNTING.launches = counting


class Counted(NamedTuple):
    """What quantization adds to a step.

    Args:
        forward: Launches more than the float network's.
        backward: Alike.
        kernels: Ours, of both.
        activations: How many activation quantizers there are.
        weights: How many weight quantizers.
    """

    forward: int
    backward: int
    kernels: list[Launch]
    activations: int
    weights: int


def added_launches(
    make: Callable[[], nn.Module],
    x: Tensor,
    recipe: Any,
    *,
    triton: bool = True,
    observing: bool = False,
    compact: bool = False,
    batch: int = 64,
) -> Counted:
    """Prepare and calibrate a network on the CPU, and count its third step on the meta device."""
    on_meta = torch.empty((batch, *x.shape[1:]), device="meta")
    plain = step(make().train().to("meta"), on_meta, triton=False)
    model = make().train()
    prepare(model, recipe, x)
    model(x)
    model(x)
    quantizers = activation_quantizers(model)
    switch(model, deferred=True, observing=observing)
    set_compact(model, compact)
    model.to("meta")
    for _ in range(2):
        # The first step fills tables and finds out who reads a relu.
        counted = step(model, on_meta, triton=triton)
        for quantizer in quantizers.values():
            quantizer.pending = None
    weights = sum(isinstance(module, WeightQuantizer) for module in model.modules())
    return Counted(
        counted.forward - plain.forward,
        counted.backward - plain.backward,
        counted.kernels,
        len(quantizers),
        weights,
    )
