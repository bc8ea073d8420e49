"""A training step as one CUDA graph: captured by hand, and by torch.compile's reduce-overhead.

On a CPU the same steps run without a capture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.training.phases import set_observing
from lightning_qat.training.range_sync import activation_quantizers, commit_pending
from tests.join_networks import NETWORKS, PIECES, inputs_for

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
LEARNED = {"activation": {"quantizer": "learned"}, "weight": {"quantizer": "learned"}}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ready(name: str, recipe: Any, memory: Any, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A prepared network with a range everywhere, its input and a target."""
    model, x = (NETWORKS | PIECES)[name][0]().to(device), inputs_for(name, 8).to(device)
    prepare(model, recipe, x, memory)
    with torch.no_grad():
        target = torch.randn_like(model.train()(x))
    for quantizer in activation_quantizers(model).values():
        quantizer.deferred = True
    set_observing(activation_quantizers(model).values(), False)
    return model, x, target


def stepper(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(call(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def captured(step: Callable[[], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """A function that replays a step, captured as torch's notes on CUDA graphs say."""
    if x.device.type == "cpu":
        return step
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss.clone()

    return replay


def warmed_up(step: Callable[[], Tensor], x: Tensor) -> list[Tensor]:
    """Some steps, on a stream of their own where there are streams."""
    if x.device.type == "cpu":
        return [step() for _ in range(3)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        losses = [step() for _ in range(3)]
    torch.cuda.current_stream().wait_stream(side)
    return losses


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    # On a GPU another algorithm may sum in another order, and a value near a tie is a step away.
    tolerance = 0.0 if found[0].device.type == "cpu" else 1e-2
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)
    assert not torch.equal(found[0], found[-1])  # it learns


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("recipe", "memory"), [("int8", "fast"), ("int8", "compact"), (LEARNED, "fast")]
)
@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v3_block", "encoder_block"])
def test_a_captured_step_trains_as_an_eager_one(
    name: str, recipe: Any, memory: Any, device: str
) -> None:
    model, x, target = ready(name, recipe, memory, device)
    twin = copy.deepcopy(model)
    eager = stepper(twin, twin, x, target)
    wanted = [eager() for _ in range(6)]
    step = stepper(model, model, x, target)
    found = warmed_up(step, x)
    replay = captured(step, x)
    found += [replay() for _ in range(3)]
    assert_close(found, wanted)


# torch's compiler uses what torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("observing", [False, True])
@pytest.mark.parametrize("recipe", ["int8", LEARNED], ids=["int8", "learned"])
def test_reduce_overhead_trains_as_eager(recipe: Any, observing: bool, device: str) -> None:
    model, x, target = ready("inverted residual", recipe, "fast", device)
    twin = copy.deepcopy(model)
    options = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
    call: Any = torch.compile(model, fullgraph=True, **options)  # type: ignore[call-overload]

    def losses(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        quantizers = activation_quantizers(model)
        set_observing(quantizers.values(), observing)
        step, found = stepper(model, call, x, target), []
        # Warm up, record, replay.
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            found.append(step().clone())
            if observing:
                commit_pending(quantizers)
        return found

    found, wanted = losses(model, call), losses(twin, twin)
    if device == "cpu":
        # Without a code generator, to the bit.
        assert_close(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0)
    pairs = zip(*(activation_quantizers(m).values() for m in (model, twin)), strict=True)
    for one, other in pairs:
        assert float(one.batches) == float(other.batches)
        torch.testing.assert_close(one.max_val, other.max_val, rtol=1e-2, atol=0)
