"""Make the quantizer of a spec; list the learned parameters of a model."""

from __future__ import annotations

from typing import Literal

from torch import nn

from lightning_qat.quantizers.activation import ActivationQuantizer, ParameterQuantizer
from lightning_qat.quantizers.learned_activation import (
    LearnedActivation,
    LearnedClipActivation,
    LearnedStepActivation,
)
from lightning_qat.quantizers.learned_weight import LearnedWeightQuantizer
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec


def activation_quantizer(spec: ActivationSpec) -> ActivationQuantizer:
    """The quantizer that a spec asks for."""
    if spec.quantizer == "weight":
        return ParameterQuantizer(spec)
    if spec.quantizer == "learned":
        return LearnedStepActivation(spec)
    return LearnedClipActivation(spec) if spec.quantizer == "ulq" else ActivationQuantizer(spec)


def weight_quantizer(
    spec: WeightSpec, axis: int, channels: int, groups: int = 1
) -> WeightQuantizer:
    """The quantizer that a spec asks for.

    Args:
        spec: The spec.
        axis: The output channels' axis of the weight.
        channels: The number of output channels; with groups they are more than the axis is long.
        groups: Of a transposed convolution.
    """
    if spec.quantizer in ("learned", "ulq"):
        return LearnedWeightQuantizer(spec, axis, channels, groups)
    return WeightQuantizer(spec, axis, groups)


def quantizer_parameters(
    model: nn.Module, of: Literal["weights", "activations"] | None = None
) -> list[nn.Parameter]:
    """The learned scales and range ends of a model, in the order of registration.

    Weight decay would pull them to zero; give them a group of their own in the optimizer. The
    scales of weights may have another learning rate, too: Adam's steps are as long as the rate
    whatever it is that learns, and a scale is a fraction of the weights.

        >>> import torch
        >>> from lightning_qat import prepare
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> recipe = {"weight": {"quantizer": "learned"}, "joins": False, "outputs": False}
        >>> _ = prepare(model, recipe)
        >>> scales = quantizer_parameters(model, "weights")
        >>> ranges = quantizer_parameters(model, "activations")
        >>> learned = {*scales, *ranges}
        >>> groups = [
        ...     {"params": [p for p in model.parameters() if p not in learned]},
        ...     {"params": scales, "lr": 1e-4, "weight_decay": 0.0},
        ...     {"params": ranges, "weight_decay": 0.0},
        ... ]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)

    Args:
        model: A prepared model.
        of: Only those of weights, or of activations.

    Raises:
        ValueError: ``of`` is something else.
    """
    kinds = {"weights": (LearnedWeightQuantizer,), "activations": (LearnedActivation,)}
    if of is not None and of not in kinds:
        raise ValueError(f"of must be 'weights', 'activations' or None; got {of!r}.")
    wanted = kinds[of] if of is not None else (LearnedActivation, LearnedWeightQuantizer)
    return [
        p for m in model.modules() if isinstance(m, wanted) for p in m.parameters(recurse=False)
    ]


def learns(spec: ActivationSpec | WeightSpec) -> bool:
    """Whether the quantizer of a spec has parameters."""
    return spec.quantizer in ("learned", "ulq")
