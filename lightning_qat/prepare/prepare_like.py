"""Turn a float model into the QAT model that a checkpoint was saved from."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_qat.joins.apply import apply_plan, plan_of
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.layers.table import LAYERS, layer_for
from lightning_qat.model.paths import ModelPaths
from lightning_qat.model.torch_compile import plain_path
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.prepare.swap import choose_layers, swap
from lightning_qat.quantizers.names import PLAN, quantizer_of_key, quantizer_role
from lightning_qat.quantizers.stored_values import from_tensor
from lightning_qat.recipe.recipe import Recipe


def prepare_like(model: nn.Module, state_dict: Mapping[str, Any]) -> PrepareReport:
    """Swap exactly the layers that are QAT layers in a checkpoint, with its specs, in place.

    Args:
        model: A float model.
        state_dict: A QAT model's ``state_dict``; it names every quantizer and its spec.

    Raises:
        ValueError: It holds no quantizers, or names a layer that the model does not have.
    """
    specs: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in state_dict.items():
        layer, _, name = (quantizer_of_key(key) or "").rpartition(".")
        role = quantizer_role(name)
        if role is not None:
            # The last one counts: a layer's input comes first, and a plan may have changed it.
            specs[layer][role] = from_tensor(value, key)
    if not specs:
        raise ValueError(
            "The state_dict holds no quantizers: it is of a float model. Load it into the float "
            "model, then call prepare."
        )
    state_dict = {plain_path(key): value for key, value in state_dict.items()}
    paths = ModelPaths.of(model)
    layers = paths.by_path
    for name in [name for name in specs if layer_for(layers.get(name)) is None]:
        # A projection has the spec of its attention.
        owner = name.rpartition(".")[0]
        if isinstance(layers.get(owner), nn.MultiheadAttention):
            specs[owner] = specs.pop(name)
    unknown = [name for name in specs if layer_for(layers.get(name)) is None]
    if unknown:
        raise ValueError(
            f"The checkpoint quantizes {unknown}, which {type(model).__name__} does not have as "
            f"{sorted(kind.__name__ for kind in LAYERS)} layers. Build the model that was trained."
        )
    # A name may hold what a pattern would take for a wildcard.
    patterns: dict[str, Any] = {glob.escape(name): change for name, change in specs.items()}
    recipe = Recipe(include=tuple(patterns), overrides=patterns)
    report = choose_layers(paths, recipe)
    swap(paths, report)
    if PLAN in state_dict:
        apply_plan(model, JoinPlan.from_dict(from_tensor(state_dict[PLAN], PLAN)))
    return replace(report, joins=plan_of(model))
