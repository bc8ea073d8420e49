"""Training steps of one variant of one network: what a row's process does, and how rows compare.

A step is forward, cross entropy, backward, SGD with momentum, and for our variants what
`QATCallback` does around it: weights quantized once per optimizer step, and one commit of all
ranges while they are observed. Float has a process of its own beside the variant's. They take turns
of several steps; a turn of the variant is divided by the mean of float's right before and after it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.on_gpu.nets import network
from benchmarks.peers import Peer
from benchmarks.row_process import RowProcess
from benchmarks.step import OURS, build, peers
from lightning_qat.quantizers.weight_cache import QuantizedWeightCache
from lightning_qat.training.range_sync import activation_quantizers, commit_pending
from lightning_qat.training.weights_once import use_weight_cache

PRECISIONS: Mapping[str, str] = {"bf16": "bf16-mixed, channels_last", "tf32": "float32 (TF32)"}
MODES: Mapping[str, str | None] = {
    "eager": None,
    "compiled": "default",
    "graphs": "reduce-overhead",
}
"""How the model runs, and the mode of ``torch.compile``."""

FLOAT = "float"
OWN = ("joins, frozen", "joins, observing", "joins, learned", "joins, frozen, compact")
LAYERS_ONLY = "layers, frozen"
"""What Brevitas and ModelOpt quantize: inputs and weights of layers."""

CALIBRATION = 8
"""Images that a peer sees on the CPU, where its layers are made."""

TURN, ROUNDS = 0.3, 5
"""Seconds of a turn at least, and turns of a variant."""

RATE = 1e-4
"""Learning rate: small enough for random data."""

WARM_UP = 5
"""Steps until compilers, cuDNN and CUDA graphs have chosen what they do."""


@dataclass(frozen=True)
class Config:
    """What all variants of a network have in common.

    Args:
        net: A name of ``NETS``.
        batch: Images per step.
        precision: A name of ``PRECISIONS``.
        mode: A name of ``MODES``.
    """

    net: str
    batch: int
    precision: str
    mode: str

    @property
    def name(self) -> str:
        """Such as ``resnet50 256/bf16/eager``."""
        return f"{self.net} {self.batch}/{self.precision}/{self.mode}"


def peer_variants() -> list[str]:
    """Other tools that are installed, and those that freeze ranges once more with them frozen."""
    found = []
    for name, peer in peers().items():
        # Those that have nothing to freeze carry the field's default.
        found += [name] if peer.freeze is Peer.freeze else [name, f"{name}, frozen"]
    return found


def model_of(config: Config, variant: str, device: str, narrow: bool) -> tuple[Any, Tensor, Tensor]:
    """A variant that is ready to train, its images and their classes, on the device."""
    net, x, y = network(config.net, config.batch, narrow)
    layout = torch.channels_last if config.precision == "bf16" else torch.contiguous_format
    own = variant == FLOAT or variant in OURS
    if own:
        net, x = net.to(device), x.to(device)
    model = build(net, x if own else x[:CALIBRATION], variant)
    model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    waiting = [name for name, q in activation_quantizers(model).items() if not q.calibrated]
    if waiting:
        raise RuntimeError(f"has no range for {', '.join(waiting[:3])} and would not quantize")
    return model, x.to(device, memory_format=layout), y.to(device)


def stepper(model: nn.Module, x: Tensor, y: Tensor, config: Config) -> Callable[[], None]:
    """One training step."""
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    observing = {name: q for name, q in activation_quantizers(model).items() if q.observing}
    weights = QuantizedWeightCache()
    use_weight_cache(model, weights)
    bf16 = torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    begin: Any = torch.compiler.cudagraph_mark_step_begin  # not typed
    call: Any = model
    if MODES[config.mode] is not None:
        # Inductor takes half a minute for each network on a CPU.
        cuda = x.device.type == "cuda"
        options: dict[str, Any] = {"mode": MODES[config.mode]} if cuda else {"backend": "aot_eager"}
        call = torch.compile(model, **options)

    def step() -> None:
        if config.mode == "graphs":
            begin()
        optimizer.zero_grad()
        weights.open = True
        with bf16:
            loss = F.cross_entropy(call(x), y)
        torch.autograd.backward(loss)
        weights.forget()
        optimizer.step()
        weights.open = False
        if observing:
            commit_pending(observing)

    return step


def turns(config: Config, variant: str, device: str, narrow: bool) -> Iterator[Any]:
    """In a row's process: the peak of memory (bytes, or 0), then seconds per step of turns."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    step = stepper(*model_of(config, variant, device, narrow), config)
    cuda = device == "cuda"

    def seconds(steps: int) -> float:
        wait = torch.cuda.synchronize if cuda else torch.cpu.synchronize
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return (time.perf_counter() - start) / steps

    seconds(1)
    if cuda:
        # The first step makes what lives on, and cuDNN tries algorithms in it.
        torch.cuda.reset_peak_memory_stats()
    seconds(WARM_UP)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    steps = 1 if narrow else max(1, round(TURN / seconds(1)))
    yield peak
    # On a small card float and the variant do not fit beside each other.
    cramped = cuda and peak > 0.3 * torch.cuda.get_device_properties(0).total_memory
    while True:
        seconds(2 if cramped else 1)
        found = seconds(steps)
        if cramped:
            torch.cuda.empty_cache()
        yield found


def touches_device() -> Iterator[Any]:
    """In a process of its own: use the device."""
    yield float(torch.ones((), device="cuda"))


class Float:
    """The float network of a configuration in its process.

    Args:
        config: The configuration.
        device: ``cuda`` or ``cpu``.
        narrow: The narrow network.
        until: When to give up, a time of ``time.monotonic``.
    """

    def __init__(self, config: Config, device: str, narrow: bool, until: float) -> None:
        self.config, self.device, self.narrow = config, device, narrow
        self.process = RowProcess(turns, config, FLOAT, device, narrow)
        try:
            self.peak: int = self.process.answer(until)
            found = [self.process.answer(until) for _ in range(ROUNDS)]
        except BaseException:
            self.process.stop()
            raise
        self.row = {"ms": statistics.median(found) * 1e3, "peak_bytes": self.peak}

    def compared(self, variant: str, until: float) -> dict[str, Any]:
        """The row of a variant: its time and its peak of memory over float's.

        Raises:
            RowFailed: One of the two processes cannot go on, or the time is over.
        """
        process = RowProcess(turns, self.config, variant, self.device, self.narrow)
        try:
            peak = process.answer(until)
            ratios, times = [], []
            before = self.process.answer(until)
            for _ in range(2 if self.narrow else ROUNDS):
                times.append(process.answer(until))
                after = self.process.answer(until)
                ratios.append(times[-1] / ((before + after) / 2))
                before = after
        finally:
            process.stop()
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row = {"ratio": middle, "low": low, "high": high, "ms": statistics.median(times) * 1e3}
        if self.peak:
            row["peak"] = peak / self.peak
        return row
