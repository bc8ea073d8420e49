"""What quantization adds to a training step on a GPU: launches and bytes, counted without a GPU.

    python -m benchmarks.launches

The step runs on the meta device, where nothing is computed. Counted are operations of torch that
are no views and no allocations, and our kernels where they would be launched. Every row is what it
adds to the float network's own launches, forward / backward; *bytes* is what our kernels read and
write over the floor: each quantized tensor read and written once per direction, each weight once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.nets import Encoder, mobilenet, resnet18
from benchmarks.peers import PEERS
from lightning_qat import prepare
from lightning_qat.numerics.gpu.launch import Launch, count_launches
from lightning_qat.quantizers.switches import switch
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.training.phases import set_compact
from lightning_qat.training.range_sync import activation_quantizers, drop_pending

_LAUNCHES_NOTHING = frozenset(
    "view _unsafe_view t transpose permute expand detach alias as_strided slice select unbind "
    "split unsqueeze squeeze reshape unflatten unfold split_with_sizes lift_fresh empty empty_like "
    "empty_strided new_empty new_empty_strided".split()
)


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations of torch that are no views and no allocations: each is a launch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
        """How many there were."""
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


def _fewest_bytes(kernels: Sequence[Launch]) -> int:
    """Each tensor read and written once, without bits, ranges and tables."""
    forward = sum(2 * launch.read for launch in kernels if launch.kernel == "fake_quantize")
    others = ("masked", "learned_backward", "quantize_weights")
    return forward + sum(2 * launch.written for launch in kernels if launch.kernel in others)


class Counted(NamedTuple):
    """What quantization adds to a step.

    Args:
        forward: Launches more than the float network's.
        backward: Alike.
        kernels: Ours, of both.
        floor: The fewest bytes that they could move.
        activations: How many activation quantizers there are.
        weights: How many weight quantizers.
    """

    forward: int
    backward: int
    kernels: list[Launch]
    floor: int
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
    """Prepare and calibrate a network on the CPU, and count a later step on the meta device."""
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

    def one_step() -> Step:
        drop_pending(quantizers.values())
        return step(model, on_meta, triton=triton)

    # The first steps find out who reads a relu, and which weights stay where they are.
    for _ in range(3):
        one_step()
    counted = one_step()
    weights = sum(isinstance(module, WeightQuantizer) for module in model.modules())
    return Counted(
        counted.forward - plain.forward,
        counted.backward - plain.backward,
        counted.kernels,
        _fewest_bytes(counted.kernels),
        len(quantizers),
        weights,
    )


NETS: Mapping[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "MobileNetV2-style": mobilenet,
    "encoder": Encoder,
}
LEARNED = {"activation": {"quantizer": "learned"}, "weight": {"quantizer": "learned"}}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "frozen": {},
    "observing": {"observing": True},
    "learned (LSQ)": {"recipe": LEARNED},
    "observing, compact": {"observing": True, "compact": True},
    "frozen, no Triton": {"triton": False},
    "observing, no Triton": {"triton": False, "observing": True},
}


def added_by_torch_ao(make: Callable[[], nn.Module], x: Tensor) -> tuple[int, int]:
    """Launches that torch.ao's FX mode adds to a step, forward and backward."""
    on_meta = torch.empty((64, *x.shape[1:]), device="meta")
    plain = step(make().train().to("meta"), on_meta, triton=False)
    model = PEERS["torch.ao FX"].prepare(make(), [x], 8, 8).train().to("meta")
    added = step(model, on_meta, triton=False)
    return added.forward - plain.forward, added.backward - plain.backward


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    x = torch.randn(2, 3, 32, 32)
    rows: dict[str, list[str]] = {name: [] for name in ["quantizers", *VARIANTS, "torch.ao FX"]}
    for make in NETS.values():
        counted = added_launches(make, x, "int8")
        rows["quantizers"].append(f"{counted.activations} + {counted.weights} weights")
        for name, variant in VARIANTS.items():
            arguments = {"recipe": "int8", **variant}
            counted = added_launches(make, x, **arguments)
            moved = sum(launch.read + launch.written for launch in counted.kernels)
            share = f", {moved / counted.floor:.2f} bytes" if name == "observing" else ""
            rows[name].append(f"{counted.forward} / {counted.backward}{share}")
        rows["torch.ao FX"].append("{} / {}".format(*added_by_torch_ao(make, x)))
    print("| launches added, forward / backward |", " | ".join(NETS), "|")
    print("|---|" + "---|" * len(NETS))
    for name, cells in rows.items():
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
