"""The base class of QAT layers: made from a float layer, and turned back into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_qat.layers.own_class import (
    is_made_here,
    pickled,
    quantized_class,
    unquantized_class,
)
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.factory import activation_quantizer, weight_quantizer
from lightning_qat.quantizers.final import FinalActivation, FinalWeight
from lightning_qat.quantizers.names import INPUT, weight_quantizer_name
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.amct_config import is_layer_config, layer_recipe
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import LayerSpec

_Layer = TypeVar("_Layer", bound="QATLayer")


class QATLayer(nn.Module):
    """A float layer that fake-quantizes its input and its weight.

    A QAT layer is a subclass of its float layer with two submodules, ``input_quantizer`` and
    ``weight_quantizer``; one with several weights or inner activations has a quantizer for each.
    Parameters, their names, hooks and aliases are the float layer's own, so a float checkpoint
    loads into it and its weights load into a float layer.
    """

    float_class: ClassVar[type[nn.Module]]
    """The float layer that this one quantizes, also in subclasses of the user's."""

    channel_axis: ClassVar[int] = 0
    """The output channel's axis of the weight."""

    quantizes_input: ClassVar[bool] = True
    """It has an ``input_quantizer``, itself or in its parts."""

    opaque: ClassVar[bool] = False
    """It quantizes inside what has to be: none of the functions it calls is a join."""

    weight: Tensor
    input_quantizer: ActivationQuantizer | FinalActivation
    weight_quantizer: WeightQuantizer | FinalWeight

    @classmethod
    def weight_names(cls, module: nn.Module) -> tuple[str, ...]:
        """The weights of a float or QAT layer that are quantized, each by a submodule.

        ``weight_quantizer_name`` gives the submodule's name.
        """
        return ("weight",)

    def activation_quantizer_names(self) -> tuple[str, ...]:
        """The submodules that quantize activations; the first one is the layer's input's."""
        return (INPUT,)

    @classmethod
    def why_unsupported(cls, module: nn.Module) -> str | None:
        """Why a float layer of the right type can still not be quantized, ``None`` when it can."""
        return None

    @classmethod
    def swap(cls: type[_Layer], module: nn.Module, spec: LayerSpec) -> _Layer:
        """Turn a float layer into a QAT layer in place; the object stays the same.

        Args:
            module: A float layer of ``float_class``, or of a subclass: that stays in front; see
                ``own_class``.
            spec: Its quantizers.

        Raises:
            TypeError: ``module`` is of another type, or a QAT layer already.
            ValueError: It cannot be quantized; see ``why_unsupported``.
        """
        if not isinstance(module, cls.float_class) or isinstance(module, QATLayer):
            raise TypeError(
                f"{cls.__name__} quantizes float layers of {cls.float_class.__name__}; got "
                f"{type(module).__name__}."
            )
        reason = cls.why_unsupported(module)
        if reason is not None:
            raise ValueError(f"{cls.float_class.__name__} cannot become {cls.__name__}: {reason}.")
        module.__class__ = quantized_class(module, cls)
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
            module: A float layer of ``float_class``, or of a subclass.
            config: A recipe, the name of a preset, a recipe file or a mapping, also AMCT's with
                ``retrain_data_config`` and ``retrain_weight_config``; ``int8`` by default.

        Raises:
            TypeError: ``module`` is of another type.
            ValueError: It cannot be quantized, ``config`` breaks a rule, or the recipe keeps such
                layers float.
        """
        return cls.swap(cls._twin(module), cls._spec(config))

    def to_float(self) -> nn.Module:
        """A new float layer with the very parameters of this one, which stays as it is."""
        twin = self._twin(self)
        for name in self.quantizer_names():
            delattr(twin, name)
        twin.__class__ = unquantized_class(self)
        return twin

    def unswap(self) -> None:
        """Turn it back into the float layer in place; the object and its parameters stay."""
        for name in self.quantizer_names():
            delattr(self, name)
        self.__class__ = unquantized_class(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle, which finds no class that was made for a user's."""
        if not is_made_here(type(self)):
            return super().__reduce_ex__(protocol)
        return pickled(self)

    @classmethod
    def _twin(cls, module: nn.Module) -> nn.Module:
        """A new module with the very parameters of another."""
        twin = module.__class__.__new__(module.__class__)
        twin.__dict__ = _copied(module.__dict__)
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

    def channel_groups(self) -> int:
        """How many groups of rows of the weight have output channels of their own."""
        return 1

    def quantizer_names(self) -> tuple[str, ...]:
        """All submodules that quantize."""
        weights = map(weight_quantizer_name, self.weight_names(self))
        return (*self.activation_quantizer_names(), *weights)

    def _add_quantizers(self, spec: LayerSpec) -> None:
        weights = self.weight_names(self)
        with torch.device(getattr(self, weights[0]).device):
            for name in self.activation_quantizer_names():
                setattr(self, name, activation_quantizer(spec.activation))
            for name in weights:
                groups = self.channel_groups()
                channels = getattr(self, name).shape[self.channel_axis] * groups
                quantizer = weight_quantizer(spec.weight, self.channel_axis, channels, groups)
                setattr(self, weight_quantizer_name(name), quantizer)
        for name in self.quantizer_names():
            getattr(self, name).train(self.training)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes; its tables of parameters, submodules and hooks are its own."""
    return {
        name: value.copy() if isinstance(value, dict | list) else value
        for name, value in attributes.items()
    }
