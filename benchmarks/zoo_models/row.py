"""One architecture from float to files: what each stage took, what the files hold."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.zoo_models.coverage import (
    Products,
    deploy_products,
    is_float_product,
    optimized_products,
    qdq_products,
    tflite_products,
)
from benchmarks.zoo_models.entry import Architecture, Inputs
from benchmarks.zoo_models.unsaid import unsaid
from lightning_qat import QuantizedModel, calibrate_unseen, convert, export, prepare, verify
from lightning_qat.export.protocol import Artifact
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.phases import apply_phase, finish
from lightning_qat.training.range_sync import commit_ranges

STEPS = 3
"""Training steps: two that observe, one with ranges frozen."""
NUDGE = 1e-6
"""How much the inputs are scaled, and products are off, to see how far the model itself moves."""

_PRODUCTS: Mapping[str, tuple[str, Callable[[Path], Products]]] = {
    "fake_quant_onnx": ("model", qdq_products),
    "cann": ("deploy", deploy_products),
    "tflite": ("model", tflite_products),
}


def stages(architecture: Architecture, targets: tuple[str, ...], folder: Path) -> Iterator[Any]:
    """Run one architecture; yields after each stage what it found, with the stage's name.

    Args:
        architecture: What to run.
        targets: Names of exporters.
        folder: For the files.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    clock = Clock()
    net = architecture.build()
    inputs = architecture.inputs()
    with torch.no_grad():
        _call(net.eval(), inputs)
    parameters = sum(p.numel() for p in net.parameters())
    yield "build", {"seconds": clock.lap(), "parameters": parameters}

    plain = _train(net, architecture, None)
    yield "float step", {"seconds": clock.lap(), "step": plain}

    report = prepare(net, "int8", inputs)
    yield "prepare", {"seconds": clock.lap(), **_reported(report)}

    step = _train(net, architecture, 0)
    yield "train", {"seconds": clock.lap(), "step": step}

    calibrate_unseen(net, inputs)
    finish(net)
    quantized = convert(net.eval(), inputs)
    yield (
        "convert",
        {
            "seconds": clock.lap(),
            "moves": moves(quantized, inputs),
            "unreached": quantized.unreached,
        },
    )
    said = _said(report)
    for target in targets:
        yield target, _exported(quantized, target, folder, said, clock)


class Clock:
    """Seconds between calls."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        self._last, seconds = now, now - self._last
        return round(seconds, 3)


def _call(net: nn.Module | QuantizedModel, inputs: Inputs) -> Any:
    return net(**inputs) if isinstance(inputs, dict) else net(*inputs)


def loss_of(net: nn.Module, inputs: Inputs) -> Tensor:
    """The sum of the mean squares of all outputs that have a gradient."""
    outputs = pytree.tree_leaves(_call(net, inputs))
    real = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
    return torch.stack([y.square().mean() for y in real]).sum()


def _train(net: nn.Module, architecture: Architecture, phase: int | None) -> float:
    """Some steps of gradient descent on the outputs' squares; seconds of the last one."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    seconds = 0.0
    net.train()
    for number in range(STEPS):
        if phase is not None:
            apply_phase(net, Phase("quantize", number < STEPS - 1, True, False))
        began = time.perf_counter()
        loss = loss_of(net, architecture.inputs())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if phase is not None:
            commit_ranges(net)
        seconds = time.perf_counter() - began
    net.eval()
    return round(seconds, 4)


def _reported(report: PrepareReport) -> dict[str, Any]:
    plan = report.joins
    assert plan is not None
    return {
        "layers": len(report.swapped),
        "skipped": [f"{s.name} ({s.kind}): {s.reason}" for s in report.skipped],
        "tensors": len(plan.tensors),
        "left_float": list(plan.left_float),
    }


def _said(report: PrepareReport) -> str:
    """Everything that the report says stays float."""
    plan = report.joins
    assert plan is not None
    return "\n".join([*(s.name for s in report.skipped), *plan.left_float])


def moves(quantized: QuantizedModel, inputs: Inputs) -> float:
    """How far the outputs move by what floating point leaves open, in steps of the outputs.

    The larger of two: the inputs are scaled by 1 + 1e-6, which a quantizer at the input absorbs as
    a rule; and each number that a product gives is off by a millionth, up or down, as sums in
    another order are.
    """

    def nudged(x: Any) -> Any:
        return x * (1 + NUDGE) if isinstance(x, Tensor) and x.is_floating_point() else x

    with torch.no_grad():
        one = quantized.flat_outputs(_call(quantized, inputs))
        others = [quantized.flat_outputs(_call(quantized, pytree.tree_map(nudged, inputs)))]
        with _ProductsOff():  # type: ignore[no-untyped-call]
            others.append(quantized.flat_outputs(_call(quantized, inputs)))
    largest = 0.0
    for name, y in one.items():
        if isinstance(y, Tensor) and y.is_floating_point() and y.numel():
            span = float(y.max() - y.min()) / 255.0
            step = quantized.output_steps.get(name) or span
            if step > 0.0:
                far = max(float((y - other[name]).abs().max()) for other in others)
                largest = max(largest, far / step)
    return round(largest, 4)


_ATEN = torch.ops.aten


class _ProductsOff(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every number that a convolution or matrix product gives is off by a millionth."""

    products = (_ATEN.convolution, _ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.products:
            signs = torch.randint_like(result, 2) * 2 - 1
            return result * (1 + NUDGE * signs)
        return result


def _exported(
    quantized: QuantizedModel, target: str, folder: Path, said: str, clock: Clock
) -> dict[str, Any]:
    """Write and check the files of one target; an error is part of what is found."""
    found: dict[str, Any] = {}
    artifact: Artifact | None = None
    try:
        clock.lap()
        artifact = export(quantized, target, folder / "net")
        found["seconds"] = clock.lap()
        agreement = verify(quantized, artifact)
        found["verify_seconds"] = clock.lap()
        found["differences"] = list(agreement.parameter_differences or ())
        found["steps"] = {r.runtime: round(r.max_steps, 4) for r in agreement.runtimes}
        found["cautions"] = list(agreement.cautions)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:2000]
    if artifact is None:
        return found
    found["notes"] = [*artifact.notes, *artifact.differences]
    file, count = _PRODUCTS[target]
    path = artifact.files.get(file) or next(iter(artifact.files.values()))
    found["products"] = {}
    with contextlib.suppress(ImportError):
        products = count(path)
        found["integer_products"] = products.integer
        found["float_products"] = list(products.floats)
        found["unsaid"] = unsaid(products.floats, "\n".join([said, *found["notes"]]))
    if target == "fake_quant_onnx":
        optimized = optimized_products(path)
        found["optimized"] = optimized
        found["optimized_float"] = sum(n for op, n in optimized.items() if is_float_product(op))
    return found
