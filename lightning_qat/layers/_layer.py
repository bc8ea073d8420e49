"""What every QAT layer shares: how it comes from a float layer and goes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_qat.amct_config import is_layer_config, layer_recipe
from lightning_qat.learned_quantizers import activation_quantizer, weight_quantizer
from lightning_qat.quantizers import (
    ActivationQuantizer,
    FinalActivation,
    FinalWeight,
    WeightQuantizer,
)
from lightning_qat.recipe import LayerSpec, Recipe

WITH_WEIGHTS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.Embedding,
)
"""torch's layers with weights: each becomes a QAT layer or is reported as one that does not."""

_Layer = TypeVar("_Layer", bound="QATLayer")


class QATLayer(nn.Module):
    """A float layer that fake-quantizes its input and its weight.

    A QAT layer is a subclass of its float layer with two submodules, ``input_quantizer`` and
    ``weight_quantizer``. Parameters, their names, hooks and aliases are the float layer's own, so a
    float checkpoint loads into it and its weights load into a float layer.
    """

    float_class: ClassVar[type[nn.Module]]
    """The float layer that this one quantizes; exactly this type is swapped."""

    channel_axis: ClassVar[int] = 0
    """The output channel's axis of the weight."""

    weight: Tensor
    input_quantizer: ActivationQuantizer | FinalActivation
    weight_quantizer: WeightQuantizer | FinalWeight

    @classmethod
    def why_unsupported(cls, module: nn.Module) -> str | None:
        """Why a float layer of the right type can still not be quantized, ``None`` when it can."""
        return None

    @classmethod
    def swap(cls: type[_Layer], module: nn.Module, spec: LayerSpec) -> _Layer:
        """Turn a float layer into a QAT layer in place; the object stays the same.

        Args:
            module: A layer of exactly ``float_class``.
            spec: Its quantizers.

        Raises:
            TypeError: ``module`` is of another type.
            ValueError: It cannot be quantized; see ``why_unsupported``.
        """
        if type(module) is not cls.float_class:
            raise TypeError(
                f"{cls.__name__} quantizes layers of exactly {cls.float_class.__name__}; got "
                f"{type(module).__name__}."
            )
        reason = cls.why_unsupported(module)
        if reason is not None:
            raise ValueError(f"{cls.float_class.__name__} cannot become {cls.__name__}: {reason}.")
        module.__class__ = cls
        layer = cast(_Layer, module)
        layer._add_quantizers(spec)
        return layer

    @classmethod
    def from_float(
        cls: type[_Layer],
        module: nn.Module,
        config: Recipe | Mapping[str, Any] | str | None = None,
    ) -> _Layer:
        """A new QAT layer with the very parameters of a float layer, which stays as it is.

        Args:
            module: A layer of exactly ``float_class``.
            config: A recipe, the name of a preset, a recipe file or a mapping, also AMCT's with
                ``retrain_data_config`` and ``retrain_weight_config``; ``int8`` by default.

        Raises:
            TypeError: ``module`` is of another type.
            ValueError: It cannot be quantized, ``config`` breaks a rule, or the recipe keeps such
                layers float.
        """
        twin = module.__class__.__new__(module.__class__)
        twin.__dict__ = {
            name: value.copy() if isinstance(value, dict) else value
            for name, value in module.__dict__.items()
        }
        return cls.swap(twin, cls._spec(config))

    def to_float(self) -> nn.Module:
        """A new float layer with the very parameters of this one, which stays as it is."""
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__ = {
            name: value.copy() if isinstance(value, dict) else value
            for name, value in self.__dict__.items()
        }
        del twin.input_quantizer, twin.weight_quantizer
        twin.__class__ = self.float_class  # type: ignore[assignment]
        return twin

    @classmethod
    def _spec(cls, config: Recipe | Mapping[str, Any] | str | None) -> LayerSpec:
        kind = cls.float_class.__name__
        if isinstance(config, Mapping) and is_layer_config(config):
            config = layer_recipe(config, kind)
        recipe = Recipe.load("int8" if config is None else config)
        spec = recipe.for_layer("", kind)
        if spec is None:
            raise ValueError(
                f"The recipe keeps {kind} layers float, so it cannot configure {cls.__name__}."
            )
        return spec

    def _add_quantizers(self, spec: LayerSpec) -> None:
        device = self.weight.device
        with torch.device(device):
            channels = self.weight.shape[self.channel_axis]
            self.input_quantizer = activation_quantizer(spec.activation)
            self.weight_quantizer = weight_quantizer(spec.weight, self.channel_axis, channels)
        self.input_quantizer.train(self.training)
        self.weight_quantizer.train(self.training)
