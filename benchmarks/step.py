"""Cost of a quantized training step over the float step: ours and every peer's, in one run.

    python -m benchmarks.step                          # ResNet-18, MobileNetV2-style, encoder
    python -m benchmarks.step --small                  # narrow nets, a minute or two
    python -m benchmarks.step --nets resnet50 lstm     # others
    python -m benchmarks.step --memory                 # bytes instead of seconds
    python -m benchmarks.step --kernels                # one tensor: ours beside torch's kernels

A step is forward, cross entropy, backward and SGD with momentum. Every variant has a process of
its own, with a heap of its own. They take turns of as many steps as fill a fifth of a second, at
least one; the median of a turn is divided by the mean of float's right before and after it, so that
the noise of the machine hits all alike. Printed are the median of these ratios and their quartiles.
A variant that cannot train a network, or is not ready within --limit seconds, says so.

Two placements stand side by side. *layers*: inputs and weights of layers are quantized, as AMCT
and ModelOpt do it. *joins*: every tensor between the layers too, which an integer target needs.
Observing: ranges follow every batch; frozen: they stand; learned: scales are trained. Plain loop:
ranges follow without ``commit_ranges``, as in a loop of one's own that only calls ``prepare``.

glibc gives freed memory back to the system and takes it anew, page by page, as soon as a step needs
a little more than before: hundreds of milliseconds that depend on sizes by chance and hit some
variants and not others. Here it is told to keep memory, for all variants alike, which is what
`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647` in the environment, or jemalloc, do in
a training of one's own. --malloc default leaves the allocator as it is.

Threads that wait for each other spin for a while, as torch comes. Where other programs need the
cores, OMP_WAIT_POLICY=passive in the environment lets them sleep; on a quiet machine that makes
every operation dearer, and float's step half as long again.

--memory: *kept*, the bytes that the graph keeps for backward besides parameters and buffers, over
float's; *peak*, the most memory that the process ever held, over float's. Here glibc is told to
give every larger block back at once, so that holes in the heap do not count.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import multiprocessing
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.nets import Attention, Encoder, Recurrent, mobilenet, resnet18, resnet50
from benchmarks.peers import Peer, installed
from benchmarks.saved import bytes_for_backward
from lightning_qat import prepare
from lightning_qat.training.phases import set_observing
from lightning_qat.training.range_sync import activation_quantizers, commit_pending

warnings.filterwarnings("ignore")

TURN = 0.2
"""Seconds that a turn takes at least: a step of few milliseconds alone is all noise."""

NETS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], int]] = {
    "resnet18": (resnet18, lambda: resnet18(16), 32),
    "mobilenet": (mobilenet, lambda: mobilenet(8), 32),
    "encoder": (Encoder, lambda: Encoder(64, 2), 32),
    "resnet50": (resnet50, lambda: resnet50(8), 224),
    "lstm": (Recurrent, lambda: Recurrent(32), 32),
    "attention": (Attention, lambda: Attention(64), 32),
}
"""Name to the net, a narrow one, and the size of its images."""

_OFTEN_LEFT = (nn.LSTM, nn.MultiheadAttention)
"""Layers whose weights a tool may pass over; its time would be that of float."""

_CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, before there are threads or a heap to speak of.
_CONTEXT.set_forkserver_preload(["lightning_qat", "torch._dynamo"])

_LAYERS = {"joins": False, "outputs": False}
_LEARNED = {"activation": {"quantizer": "learned"}, "weight": {"quantizer": "learned"}}

OURS: Mapping[str, tuple[Mapping[str, Any], bool, str]] = {
    "layers, frozen": (_LAYERS, False, "fast"),
    "layers, learned": ({**_LAYERS, **_LEARNED}, False, "fast"),
    "layers, observing": (_LAYERS, True, "fast"),
    "joins, frozen": ({}, False, "fast"),
    "joins, learned": (_LEARNED, False, "fast"),
    "joins, observing": ({}, True, "fast"),
    "joins, observing, plain loop": ({}, True, "fast"),
    "joins, frozen, compact": ({}, False, "compact"),
    "joins, observing, compact": ({}, True, "compact"),
}
"""Variant to recipe, whether ranges follow the data, and ``memory``."""


def ours(net: nn.Module, x: Tensor, variant: str) -> nn.Module:
    """A prepared twin that has seen one batch."""
    recipe, observing, memory = OURS[variant]
    twin = copy.deepcopy(net).train()
    # Two images: the run that plans keeps all its tensors.
    prepare(twin, recipe, x[:2], memory)  # type: ignore[arg-type]
    with torch.no_grad():
        twin.train()(x)
    quantizers = activation_quantizers(twin).values()
    set_observing(quantizers, observing)
    for quantizer in quantizers:
        quantizer.deferred = not variant.endswith("plain loop")
    return twin


def peers() -> dict[str, Peer]:
    """The installed peers by the names that the table shows; frozen ones apart."""
    return installed()[0]


def variants(peered: bool) -> list[str]:
    """Everything that is compared with float."""
    others = [f"{name}{state}" for name in peers() for state in ("", ", frozen")]
    return [*OURS, *(others if peered else ())]


def build(net: nn.Module, x: Tensor, variant: str) -> nn.Module:
    """The network of a variant."""
    if variant == "float":
        return copy.deepcopy(net).train()
    if variant in OURS:
        return ours(net, x, variant)
    peer = peers()[variant.removesuffix(", frozen")]
    model = peer.prepare(net, [x], 8, 8)
    left = {type(layer).__name__ for layer in model.modules() if type(layer) in _OFTEN_LEFT}
    if left:
        raise ValueError(f"leaves {', '.join(sorted(left))} float")
    model.train()(x)
    if variant.endswith(", frozen"):
        peer.freeze(model)
    return model


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What is minimised."""
    return F.cross_entropy(model(x), y)


def stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """One training step that returns its seconds."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    quantizers = activation_quantizers(model).items()
    observing = {name: q for name, q in quantizers if q.observing and q.deferred}

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x, y))
        optimizer.step()
        if observing:
            # As QATCallback does after each batch.
            commit_pending(observing)
        return time.perf_counter() - start

    return step


def keep_freed_memory() -> None:
    """Tell glibc's allocator not to give memory back; elsewhere do nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h.
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Tell glibc's allocator to give every larger block back at once; elsewhere do nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def data(size: int, batch: int) -> tuple[Tensor, Tensor]:
    """Images and classes."""
    torch.manual_seed(0)
    return torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))


def _built(
    name: str, variant: str, options: argparse.Namespace
) -> tuple[nn.Module, Tensor, Tensor]:
    """The network of a variant, its images and their classes, in a process of its own."""
    torch.set_num_threads(options.threads)
    full, narrow, size = NETS[name]
    x, y = data(size, options.batch)
    return build(narrow() if options.small else full(), x, variant), x, y


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:80]


def _steps(name: str, variant: str, options: argparse.Namespace, connection: Any) -> None:
    """A process that takes a turn whenever it is asked to, and answers with its median step."""
    if options.malloc == "tuned":
        keep_freed_memory()
    try:
        step = stepper(*_built(name, variant, options))
        # Until memory is laid out.
        for _ in range(6):
            step()
    except Exception as error:
        connection.send(_reason(error))
        return
    connection.send(0.0)
    while connection.recv():
        turn = [step()]
        while sum(turn) < TURN:
            turn.append(step())
        connection.send(statistics.median(turn))


def started(
    target: Callable[..., None], name: str, variant: str, options: argparse.Namespace
) -> tuple[Any, Any]:
    """A variant's process and the connection to it."""
    mine, other = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=target, args=(name, variant, options, other), daemon=True)
    process.start()
    # So that its end is noticed.
    other.close()
    return process, mine


def first_answer(process: Any, connection: Any, options: argparse.Namespace) -> Any:
    """What a process says when it is ready; a string: why it never will be."""
    try:
        if connection.poll(options.limit):
            return connection.recv()
    except EOFError:
        return "its process died"
    process.terminate()
    return f"not ready after {options.limit} s (--limit)"


def times(name: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Ratios to the float step by variant; ``float``: its milliseconds."""
    steps: dict[str, Callable[[], float]] = {}
    connections, processes, failed = [], [], []
    for variant in ["float", *variants(not options.no_peers)]:
        process, mine = started(_steps, name, variant, options)
        answer = first_answer(process, mine, options)
        if isinstance(answer, str):
            failed.append(f"  {variant:32} cannot: {answer}")
            continue
        connections.append(mine)
        processes.append(process)

        def step(mine: Any = mine) -> float:
            mine.send(True)
            seconds: float = mine.recv()
            return seconds

        steps[variant] = step
    if "float" not in steps:
        raise RuntimeError(f"{name}: " + " ".join(failed[0].split()))
    found: dict[str, list[float]] = {variant: [] for variant in steps}
    before = steps["float"]()
    for _ in range(options.rounds):
        for variant in list(steps)[1:]:
            seconds, after = steps[variant](), steps["float"]()
            found[variant].append(seconds / ((before + after) / 2))
            found["float"].append(after * 1e3)
            before = after
    for connection in connections:
        connection.send(False)
    for process in processes:
        process.join()
    print(f"{name}: float step {statistics.median(found['float']):.0f} ms")
    for variant, ratios in list(found.items())[1:]:
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"  {variant:32} {middle:.2f}  ({low:.2f} .. {high:.2f})")
    print(*failed, sep="\n", flush=True)
    return found


def _bytes(name: str, variant: str, options: argparse.Namespace, connection: Any) -> None:
    if options.malloc == "tuned":
        give_back_freed_memory()
    try:
        model, x, y = _built(name, variant, options)
        gc.collect()
        loss = loss_of(model, x, y)
        kept = bytes_for_backward(loss, [*model.parameters(), *model.buffers()])
        del loss
        step = stepper(model, x, y)
        for _ in range(3):
            step()
    except Exception as error:
        connection.send(_reason(error))
        return
    # Not ru_maxrss, which a process inherits.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    connection.send((kept, peak))


def memory(name: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Bytes kept and peak by variant; ``float``: in MiB, others over it."""
    # Fresh processes: a peak is never given back, and no variant may profit from another's.
    found: dict[str, list[float]] = {}
    float_bytes: tuple[int, int] = (1, 1)
    for variant in ["float", *variants(not options.no_peers)]:
        process, connection = started(_bytes, name, variant, options)
        result = first_answer(process, connection, options)
        process.join()
        if isinstance(result, str):
            print(f"  {variant:32} cannot: {result}")
        elif variant == "float":
            float_bytes = result
            found[variant] = [value / 2**20 for value in result]
            kept, peak = found[variant]
            print(f"{name}: float keeps {kept:.0f} MiB; peak {peak:.0f} MiB")
            print(f"  {'':32} kept  peak")
        else:
            found[variant] = [a / b for a, b in zip(result, float_bytes, strict=True)]
            print(f"  {variant:32} " + "  ".join(f"{ratio:.2f}" for ratio in found[variant]))
    return found


_WITHOUT = ", without a compiler"


def kernels(options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds forward and backward of one tensor of 2.1 million elements."""
    from lightning_qat.numerics.fake_quantize import fake_quantize
    from lightning_qat.numerics.kernels import build as loops
    from lightning_qat.numerics.learned_fake_quantize import learned_fake_quantize
    from lightning_qat.numerics.qparams import IntegerGrid

    x = torch.randn(32, 64, 32, 32, requires_grad=True)
    upstream = torch.randn_like(x)
    scale, zero_point, grid = torch.tensor(0.02), torch.tensor(3.0), IntegerGrid(-128, 127)
    step = scale.clone().requires_grad_()
    library = loops.compiled_loops
    ao: Any = torch
    seen: deque[Tensor] = deque(maxlen=1)

    def quantize() -> Tensor:
        return fake_quantize(x, scale, zero_point, grid, saves_input=True)

    def learn() -> Tensor:
        return learned_fake_quantize(x, step, None, grid, saves_input=True)

    calls: dict[str, Callable[[], Tensor]] = {
        "x * 1 (one pass)": lambda: x * 1,
        "ours": quantize,
        "ours, observing": lambda: fake_quantize(x, scale, zero_point, grid, observe=seen.append),
        "ours, integers too": lambda: fake_quantize(
            x, scale, zero_point, grid, carries_int_repr=True
        ),
        "ours, learned scale": learn,
        f"ours{_WITHOUT}": quantize,
        f"ours, learned scale{_WITHOUT}": learn,
        "torch.fake_quantize": lambda: ao.fake_quantize_per_tensor_affine(x, 0.02, 3, -128, 127),
        "torch's learnable": lambda: ao._fake_quantize_learnable_per_tensor_affine(
            x, step.reshape(1), torch.zeros(1), -128, 127, 1.0
        ),
    }
    try:
        compiled = torch.compile(lambda x: fake_quantize(x, scale, zero_point, grid))
        compiled(x)
        calls["ours, by torch.compile"] = lambda: compiled(x)
    except Exception as error:
        print(f"torch.compile cannot: {_reason(error)}")
    found: dict[str, list[float]] = {name: [] for name in calls}
    forward: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds + 1):
        for name, call in calls.items():
            found_library = (lambda: None) if name.endswith(_WITHOUT) else library
            with patch.object(loops, "_library", found_library):
                start = time.perf_counter()
                y = call()
                middle = time.perf_counter()
                torch.autograd.backward(y, upstream)
                found[name].append((time.perf_counter() - middle) * 1e3)
            forward[name].append((middle - start) * 1e3)
    print("2.1 million elements: best milliseconds, forward and backward")
    for name in calls:
        found[name] = [min(forward[name]), min(found[name])]
        print(f"  {name:32} {found[name][0]:6.2f} {found[name][1]:6.2f}")
    return found


def main(options: argparse.Namespace) -> None:
    """Print the tables."""
    torch.set_num_threads(options.threads)
    if options.malloc == "tuned" and options.kernels:
        keep_freed_memory()
    print(f"torch {torch.__version__}, {options.threads} threads, batch {options.batch}")
    results: dict[str, Any] = {}
    if options.kernels:
        results["kernels"] = kernels(options)
    else:
        absent = installed()[1]
        if absent and not options.no_peers:
            print("not installed:", ", ".join(absent))
        measure = memory if options.memory else times
        for name in options.nets:
            results[name] = measure(name, options)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        *("--nets",), nargs="+", choices=NETS, default=["resnet18", "mobilenet", "encoder"]
    )
    parser.add_argument("--small", action="store_true", help="narrow nets")
    parser.add_argument("--memory", action="store_true", help="bytes instead of seconds")
    parser.add_argument("--kernels", action="store_true", help="one tensor instead of nets")
    parser.add_argument("--no-peers", action="store_true", help="ours and float alone")
    parser.add_argument(
        "--limit", type=int, default=300, help="seconds for a variant to be ready (default: 300)"
    )
    parser.add_argument("--rounds", type=int, default=8, help="rounds per net (default: 8)")
    parser.add_argument("--batch", type=int, default=32, help="images per step (default: 32)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--malloc", choices=("tuned", "default"), default="tuned", help="see above (default: tuned)"
    )
    parser.add_argument("--json", help="also write the numbers to this file")
    main(parser.parse_args())
