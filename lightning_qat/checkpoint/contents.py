"""Read the quantization that a checkpoint holds, and check that it fits a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_qat.layers import QATLayer
from lightning_qat.model.torch_compile import plain_path
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.names import PLAN, SPEC, quantizer_of_key
from lightning_qat.quantizers.stored_values import from_tensor
from lightning_qat.recipe.recipe import Recipe

CALLBACK_KEY = "QATCallback"
"""Where a checkpoint's ``callbacks`` hold the state of the callback."""

STATE_VERSION = 1
"""Format version of the callback's state. A newer version is refused."""


def quantizer_prefixes(state_dict: Mapping[str, Any]) -> tuple[str, ...]:
    """The prefix of each quantizer's keys, such as ``net.conv.input_quantizer.``."""
    paths = map(quantizer_of_key, state_dict)
    return tuple(f"{path}." for path in paths if path is not None)


def is_quantized(state_dict: Mapping[str, Any]) -> bool:
    """``True`` if a state_dict is of a QAT model."""
    return bool(quantizer_prefixes(state_dict))


def missing_keys(state_dict: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Keys that a QAT checkpoint must have for the layers of a model and for its own plan."""
    names = []
    plan = from_tensor(state_dict.get(PLAN, {}), PLAN)
    for path, layer in model.named_modules():
        if not isinstance(layer, QATLayer) or plain_path(path) in plan.get("unreached", ()):
            continue
        for role in layer.quantizer_names():
            prefix = f"{path}.{role}.".lstrip(".")
            names += [f"{prefix}{name}" for name in _names(layer.get_submodule(role))]
    observed = ("min_val", "max_val", "batches", SPEC)
    names += [f"{t['quantizer']}.{name}" for t in plan.get("tensors", ()) for name in observed]
    there = {plain_path(name) for name in state_dict}
    return sorted({name for name in map(plain_path, names) if name not in there})


def _names(quantizer: nn.Module) -> Iterator[str]:
    yield from (name for name, _ in quantizer.named_buffers(recurse=False))
    yield from (name for name, _ in quantizer.named_parameters(recurse=False))
    yield SPEC


def missing_problem(state_dict: Mapping[str, Any], model: nn.Module) -> str | None:
    """A message when quantizers of the model are missing from a QAT checkpoint."""
    missing = missing_keys(state_dict, model)
    if not missing:
        return None
    shown = ", ".join(repr(name) for name in missing[:6]) + (", ..." if missing[6:] else "")
    return (
        f"A QAT checkpoint must hold every quantizer of the model; {len(missing)} keys are "
        f"missing: {shown}. It was edited, or is of another recipe or network; use the one that "
        "training wrote."
    )


def version_problem(state: Mapping[str, Any]) -> str | None:
    """A message when the callback's state is of a newer format."""
    version = state.get("version", STATE_VERSION)
    if version <= STATE_VERSION:
        return None
    return (
        f"The checkpoint's QAT state must be of format version {STATE_VERSION} or older; got "
        f"{version}. It was written by a newer lightning-qat: upgrade with "
        "pip install -U lightning-qat."
    )


def checkpoint_problem(
    checkpoint: Mapping[str, Any], model: nn.Module, recipe: Recipe, strict: bool
) -> str | None:
    """A message if a QAT checkpoint does not fit a model with QAT layers, else ``None``.

    Args:
        checkpoint: The whole checkpoint, with or without the callback's state.
        model: The model that shall load it.
        recipe: The recipe that the model was prepared with.
        strict: Every quantizer of the model must be in the checkpoint.
    """
    state = checkpoint.get("callbacks", {}).get(CALLBACK_KEY, {})
    problem = version_problem(state) or recipe_problem(state, recipe)
    if problem is None and strict:
        problem = missing_problem(checkpoint["state_dict"], model)
    return problem


def recipe_problem(state: Mapping[str, Any], recipe: Recipe) -> str | None:
    """A message that names every key in which the checkpoint's recipe differs."""
    if "recipe" not in state:
        return None
    stored, own = _flat(state["recipe"]), _flat(recipe.to_dict())
    different = [
        f"{key}: checkpoint {stored.get(key)!r}, callback {own.get(key)!r}"
        for key in sorted({*stored, *own})
        if stored.get(key) != own.get(key)
    ]
    if not different:
        return None
    return (
        "The checkpoint must be of the same recipe; it differs in "
        + "; ".join(different)
        + ". Use the recipe the checkpoint was trained with, or start anew from its float weights: "
        "strip_quantizers(checkpoint)."
    )


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = sorted(value) if key in ("include", "exclude") else value
    return flat


def was_quantizing(checkpoint: Mapping[str, Any], calibration_batches: int) -> bool:
    """``True`` if the network of a checkpoint was quantized when it was saved.

    The callback's state says so. A checkpoint of weights only has no such state; there the number
    of batches that its ranges were taken from decides.

    Args:
        checkpoint: The checkpoint.
        calibration_batches: Batches that the schedule calibrates before it quantizes.
    """
    state = checkpoint.get("callbacks", {}).get(CALLBACK_KEY)
    if state is not None:
        return bool(state["phase"]["quantizing"])
    weights = checkpoint["state_dict"]
    seen = [
        float(weights[f"{prefix}batches"])
        for prefix in quantizer_prefixes(weights)
        if f"{prefix}batches" in weights
    ]
    return max(seen, default=0.0) >= max(calibration_batches, 1)


def has_ranges(model: nn.Module) -> bool:
    """``True`` if any activation of a model has a range."""
    return any(m.calibrated for m in model.modules() if isinstance(m, ActivationQuantizer))
