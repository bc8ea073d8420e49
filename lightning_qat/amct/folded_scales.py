"""Scales before batch norm is folded that are the wanted ones afterwards, to the last bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.convert.batchnorm import BatchNormStatistics
from lightning_qat.convert.convert import convert
from lightning_qat.model.dry_run import call_of, unchanged_afterwards
from lightning_qat.model.inputs import Inputs
from lightning_qat.model.torch_compile import without_compiling
from lightning_qat.numerics.arithmetic import MIN_SCALE

_MOST_STEPS = 64
"""So many float32 steps from a variance another one is looked for; a handful suffices."""

# The second time corrects by division, the third by single steps; then nothing is left to do.
_ROUNDS = 4


def following_norms(
    model: nn.Module, layers: Collection[nn.Module], example_inputs: Inputs
) -> dict[nn.Module, _BatchNorm]:
    """The batch norm that reads each layer's output, by one forward.

    Args:
        model: The model; it stays as it is.
        layers: The layers.
        example_inputs: What its ``forward`` takes.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    if not norms:
        return {}
    made: list[tuple[Tensor, nn.Module]] = []
    found: dict[nn.Module, _BatchNorm] = {}

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made.append((output, layer))

    def find(norm: Any, args: tuple[Any, ...]) -> None:
        for tensor, layer in made:
            if args and tensor is args[0]:
                found.setdefault(layer, norm)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    handles += [norm.register_forward_pre_hook(find) for norm in norms]
    try:
        with unchanged_afterwards(model), without_compiling():
            args, kwargs = call_of(model, example_inputs)
            model(*args, **kwargs)
    except Exception:  # the capture, which comes next, says where
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def set_folded_scales(
    model: nn.Module,
    wanted: Mapping[str, tuple[Any, Tensor]],
    norms: Mapping[str, _BatchNorm],
    example_inputs: Inputs,
) -> Sequence[str]:
    """Set scales of weights so that convert, which folds batch norm into them, gives the wanted.

    The product of a float32 scale and a factor does not take every float32 value. Where it takes
    none that is wanted, the batch norm's running variance is moved by as few float32 steps as
    suffice, mostly one: less than any batch moves it.

    Args:
        model: The prepared model.
        wanted: By the name of the layer its quantizer and the scale that convert shall give.
        norms: By the name of the layer the batch norm behind it.
        example_inputs: What the model is converted with.

    Returns:
        What could not be reached, by layer and channel.
    """
    wrong: dict[str, Tensor] = {}
    for attempt in range(_ROUNDS):
        converted = convert(model, example_inputs)
        found: dict[str, list[Tensor]] = {}
        for layer in converted.layers:
            if layer.name in wanted:
                scale = converted.tensors[layer.weight_key].qparams.scale
                found.setdefault(layer.name, []).append(scale)
        wrong = {
            name: scales[0]
            for name, scales in found.items()
            if not all(_equal(scale, wanted[name][1]) for scale in scales)
        }
        if not wrong or attempt == _ROUNDS - 1:
            break
        for name, scale in wrong.items():
            quantizer, target = wanted[name]
            own = quantizer.step().cpu()
            if attempt == 0 and name in norms and own.shape == target.shape == scale.shape:
                own = _solved(norms[name], target)
            elif scale.shape != own.shape:
                continue
            elif attempt < 2:
                own = own * (target.double() / scale.double()).float()
            else:
                toward = torch.where(scale > target, 0.0, torch.inf)
                own = torch.where(scale == target, own, torch.nextafter(own, toward))
            quantizer.start_from_step(own)
    return [_difference(name, wanted[name][1], scale) for name, scale in wrong.items()]


def _equal(scale: Tensor, target: Tensor) -> bool:
    return bool((scale == target).all())


def _difference(name: str, target: Tensor, scale: Tensor) -> str:
    target = target.expand_as(scale).reshape(-1)
    different = (scale.reshape(-1) != target).nonzero().flatten()
    first = int(different[0])
    return (
        f"layer {name!r}: scale_w is not reached in {len(different)} of {len(target)} channels; in "
        f"channel {first} it must be {float(target[first]):.9g} and is "
        f"{float(scale.reshape(-1)[first]):.9g}"
    )


def _solved(norm: _BatchNorm, target: Tensor) -> Tensor:
    """Scales whose product with the factor is the target; moves the variance where none is."""
    assert norm.running_var is not None
    var = norm.running_var.detach().cpu()
    scales, variances = target.clone(), var.clone()
    missing = torch.ones_like(target, dtype=torch.bool)
    for step in sorted(range(-_MOST_STEPS, _MOST_STEPS + 1), key=abs):
        # Neighbours of positive float32 numbers are neighbours as integers.
        moved = (var.view(torch.int32) + step).clamp(min=0).view(torch.float32)
        factor = _factor(norm, moved).abs()
        near = (target.double() / factor.double()).float()
        off = target * factor < MIN_SCALE  # a channel that gamma switches off keeps its own scale
        for candidate in (target, near, *_neighbours(near)):
            product = candidate * factor
            hits = torch.where(off, candidate == target, product == target) & candidate.isfinite()
            hits &= missing & ((product >= MIN_SCALE) | off) & (candidate >= MIN_SCALE)
            scales = torch.where(hits, candidate, scales)
            variances = torch.where(hits, moved, variances)
            missing &= ~hits
        if not bool(missing.any()):
            break
    norm.running_var.copy_(variances)
    return scales


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    up, down = torch.full_like(x, torch.inf), torch.zeros_like(x)
    return torch.nextafter(x, up), torch.nextafter(x, down)


def _factor(norm: _BatchNorm, var: Tensor) -> Tensor:
    gamma = None if norm.weight is None else norm.weight.detach().cpu()
    return BatchNormStatistics(gamma, None, var, var, norm.eps).factor
