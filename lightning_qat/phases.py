"""Apply a phase to a model, and agree on ranges across processes: what a training loop calls.

``QATCallback`` calls these; a loop of one's own may as well. Without them a prepared model observes
and quantizes from the first training batch on, each quantizer for itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.interception import interception_of
from lightning_qat.kept_weights import KeptWeights
from lightning_qat.observers import UPDATES
from lightning_qat.quantizers import ActivationQuantizer, WeightQuantizer
from lightning_qat.schedule import Phase


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Every activation quantizer of a model by dotted name, in the order of registration."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)}


def apply_phase(model: nn.Module, phase: Phase) -> None:
    """Set every quantizer and batch norm of a model to a phase; calling it again changes nothing.

    Observations then wait for ``commit_ranges``. A frozen batch norm is held in eval mode by a hook
    on its own forward, so a ``model.train()`` in between does not wake it up.

    Args:
        model: A prepared model.
        phase: What holds from the next batch on.
    """
    for quantizer in activation_quantizers(model).values():
        quantizer.deferred = True
        quantizer.observing = phase.observing
    set_quantizing(model, phase.quantizing)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            _hold_in_eval(module, phase.batchnorm_frozen)


def set_observing(quantizers: Iterable[ActivationQuantizer], observing: bool) -> None:
    """Open or close the gate through which data reach the ranges."""
    for quantizer in quantizers:
        quantizer.observing = observing


def set_quantizing(model: nn.Module, quantizing: bool) -> None:
    """Turn fake quantization on or off: of activations and of weights."""
    for module in model.modules():
        if isinstance(module, ActivationQuantizer | WeightQuantizer):
            module.quantizing = quantizing


def check_memory(memory: object) -> None:
    """Refuse what is no choice of ``memory``.

    Raises:
        ValueError: It is neither ``fast`` nor ``compact``.
    """
    if memory not in ("fast", "compact"):
        raise ValueError(f"memory must be 'fast' or 'compact'; got {memory!r}.")


def set_compact(model: nn.Module, compact: bool) -> None:
    """Choose what backward keeps: little (integers and bits), or what makes it fast.

    Values and gradients are the same. While ``torch.compile`` traces, the compiler chooses.
    """
    for module in model.modules():
        interception = interception_of(module)
        if interception is not None:
            interception.compact = compact
        if isinstance(module, ActivationQuantizer | WeightQuantizer):
            module.compact = compact


def keep_weights(model: nn.Module, kept: KeptWeights | None) -> None:
    """Where the quantized weights of a model are kept for further forwards; ``None``: nowhere."""
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            module.kept = kept


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once for all forwards inside, unless an operation changes it.

    For gradient accumulation and evaluation in a loop of one's own; ``QATCallback`` does so by
    itself. Weights must not be changed through ``.data`` inside.

        >>> from lightning_qat import prepare
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = prepare(model, {"joins": False, "outputs": False})
        >>> with weights_quantized_once(model):
        ...     for x in torch.ones(3, 5, 4):
        ...         model(x).sum().backward()
    """
    kept = KeptWeights()
    kept.open = True
    keep_weights(model, kept)
    try:
        yield
    finally:
        keep_weights(model, None)


def drop_pending(quantizers: Iterable[ActivationQuantizer]) -> None:
    """Forget observations that were not committed, such as those of a learning-rate search."""
    for quantizer in quantizers:
        if quantizer.pending is not None:
            quantizer.pending = None


def commit_ranges(model: nn.Module) -> None:
    """Take the ranges observed since the last call into every quantizer, alike on all processes.

    One flat ``all_reduce(MAX)`` of all pending ``(-min, max)`` when a process group is initialised:
    the result is the range of the global batch. Every process must call it equally often. A
    quantizer through which nothing passed on any process keeps its range.

    Args:
        model: A prepared model whose quantizers are ``deferred``.

    Raises:
        ValueError: An observed range is not finite; every such layer is named, none is changed.
    """
    commit_pending(activation_quantizers(model))


def commit_pending(quantizers: Mapping[str, ActivationQuantizer]) -> None:
    """``commit_ranges`` of quantizers that are at hand, by name: no walk over the model."""
    if not quantizers:
        return
    device = next(iter(quantizers.values())).min_val.device
    never = torch.full((2,), -torch.inf, device=device)
    flat = torch.stack([never if q.pending is None else q.pending for q in quantizers.values()])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    # The one host synchronisation of an observing batch.
    bounds = flat.tolist()
    drop_pending(quantizers.values())
    if any(torch.inf in batch for batch in bounds):
        _refuse_non_finite(dict(zip(quantizers, bounds, strict=True)))
    seen: dict[str, list[int]] = defaultdict(list)
    observed = list(quantizers.values())
    for index, (quantizer, (low, _)) in enumerate(zip(observed, bounds, strict=True)):
        if low != -torch.inf:
            seen[quantizer.spec.calibration].append(index)
    for calibration, indices in seen.items():
        batch = flat if len(indices) == len(observed) else flat[indices]
        _update(calibration, [observed[i] for i in indices], batch.T)


@torch.no_grad()
def _update(calibration: str, quantizers: list[ActivationQuantizer], batch: Tensor) -> None:
    """``commit`` of many quantizers in a few operations; ``batch`` is ``(-min, max)`` by column."""
    kept = [[getattr(q, name) for q in quantizers] for name in ("min_val", "max_val", "batches")]
    low, high, batches = (torch.stack(buffers) for buffers in kept)
    UPDATES[calibration](low, high, batch, batches)
    for buffers, values in zip(kept, (low, high, batches + 1), strict=True):
        # torch's optimizers are made of it, though it is not in torch.__all__.
        torch._foreach_copy_(buffers, list(values.unbind()))  # pyright: ignore[reportPrivateImportUsage]
    for quantizer in quantizers:
        quantizer.range_changed()


def finish(model: nn.Module) -> None:
    """Leave a model as its exports will be: quantizing, observing nothing, batch norm let go."""
    for quantizer in activation_quantizers(model).values():
        quantizer.observing = False
    set_quantizing(model, True)
    release_batchnorms(model)


def release_batchnorms(model: nn.Module) -> None:
    """Let go of every batch norm that a phase held in eval mode; its mode stays as it is."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            _hold_in_eval(module, False)


def _refuse_non_finite(bounds: dict[str, list[float]]) -> None:
    bad = [
        name.removesuffix(".input_quantizer").replace("qat_joins.", "")
        for name, batch in bounds.items()
        if torch.inf in batch
    ]
    raise ValueError(
        "Activations must be finite to be given a range; NaN or infinity reached the input of "
        + ", ".join(repr(name) for name in bad)
        + ". The first of them is where to look: check the data and the learning rate, or detect "
        "the operation with torch.autograd.set_detect_anomaly(True). No range was changed."
    )


def _hold_in_eval(module: _BatchNorm, hold: bool) -> None:
    handle: Any = module.__dict__.get("_lightning_qat_hold")
    if hold and handle is None:
        module.eval()
        module.__dict__["_lightning_qat_hold"] = module.register_forward_pre_hook(_to_eval)
    elif not hold and handle is not None:
        handle.remove()
        del module.__dict__["_lightning_qat_hold"]


def _to_eval(module: nn.Module, _args: tuple[Tensor, ...]) -> None:
    module.eval()
