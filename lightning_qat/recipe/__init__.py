"""The user's request: which layers are quantized and how, when, and the files that say so."""

from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.schedule import Phase, Schedule
from lightning_qat.recipe.specs import ActivationSpec, LayerSpec, WeightSpec

__all__ = ["Recipe", "WeightSpec", "ActivationSpec", "LayerSpec", "Schedule", "Phase"]
