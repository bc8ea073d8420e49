"""What the user asks: what is quantized (recipe), when (schedule), and the files both come from."""

from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.schedule import Phase, Schedule
from lightning_qat.recipe.specs import ActivationSpec, LayerSpec, WeightSpec

__all__ = ["Recipe", "WeightSpec", "ActivationSpec", "LayerSpec", "Schedule", "Phase"]
