"""What a checkpoint must consist of, whoever wrote it: looked at before anything relies on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from lightning_qat.checkpoint.contents import CALLBACK_KEY
from lightning_qat.quantizers.names import PLAN, SPEC
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.schedule import Phase


def shape_problems(checkpoint: Any) -> list[str]:
    """What is missing in a checkpoint or of another kind than it must be; empty: nothing.

    Args:
        checkpoint: What ``torch.load`` returned.
    """
    if not isinstance(checkpoint, Mapping):
        return [f"it holds a {type(checkpoint).__name__}, no table with a state_dict"]
    return [*_problems(checkpoint)]


def shape_problem(checkpoint: Any) -> str | None:
    """All of ``shape_problems`` in one sentence; ``None``: there are none."""
    problems = shape_problems(checkpoint)
    return f"A checkpoint must be whole: {'; '.join(problems)}." if problems else None


def _problems(checkpoint: Mapping[Any, Any]) -> Iterator[str]:
    weights = checkpoint.get("state_dict")
    if weights is None and any(isinstance(value, Tensor) for value in checkpoint.values()):
        yield (
            "it is a state_dict alone. Load it with prepare(model, recipe) and "
            "model.load_state_dict(state_dict)"
        )
        return
    if not isinstance(weights, Mapping):
        yield f"'state_dict' must be a table of tensors; got {type(weights).__name__}"
    else:
        yield from _weight_problems(weights)
    hyper = checkpoint.get("hyper_parameters", {})
    if not isinstance(hyper, Mapping):
        yield f"'hyper_parameters' must be a table; got {type(hyper).__name__}"
    version = checkpoint.get("pytorch-lightning_version", "")
    if not isinstance(version, str):
        yield f"'pytorch-lightning_version' must be a text; got {version!r}"
    callbacks = checkpoint.get("callbacks", {})
    if not isinstance(callbacks, Mapping):
        yield f"'callbacks' must be a table; got {type(callbacks).__name__}"
    else:
        yield from state_problems(callbacks.get(CALLBACK_KEY, {}))


def _weight_problems(weights: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in weights.items():
        if not isinstance(key, str):
            yield f"a name in 'state_dict' must be a text; got {key!r}"
        elif not isinstance(value, Tensor) and not key.endswith((SPEC, PLAN)):
            yield f"{key!r} in 'state_dict' must be a tensor; got {type(value).__name__}"


def state_problems(state: Any) -> Iterator[str]:
    """What is wrong with the callback's own state in a checkpoint."""
    if not isinstance(state, Mapping):
        yield f"the state of {CALLBACK_KEY} must be a table; got {type(state).__name__}"
        return
    if not state:
        return
    counts = {"version": state.get("version", 0), "batches_seen": 0}
    if "phase" in state:
        counts["batches_seen"] = state.get("batches_seen")
    elif "batches_seen" in state:
        yield f"{CALLBACK_KEY}: 'phase' must be a phase of the schedule; it is missing"
    start = state.get("start", [0, 0])
    if not isinstance(start, list | tuple) or len(start) != 2:
        yield f"{CALLBACK_KEY}: 'start' must be an epoch and a step; got {start!r}"
    else:
        counts |= {"start's epoch": start[0], "start's step": start[1]}
    for name, value in counts.items():
        if type(value) is not int or not 0 <= value < 2**63:
            yield f"{CALLBACK_KEY}: {name!r} must be a count; got {value!r}"
    if not _is_phase(state.get("phase")):
        yield f"{CALLBACK_KEY}: 'phase' must be a phase of the schedule; got {state.get('phase')!r}"
    recipe = state.get("recipe", {})
    if not isinstance(recipe, Mapping):
        yield f"{CALLBACK_KEY}: 'recipe' must be a table; got {type(recipe).__name__}"
        return
    try:
        Recipe.from_dict(recipe)
    except Exception as error:  # a newer version's keys, or a file that was edited
        yield f"{CALLBACK_KEY}: 'recipe' must be a recipe; {str(error)[:200]}"


def _is_phase(phase: Any) -> bool:
    if phase is None:
        return True
    if not isinstance(phase, Mapping) or set(phase) != {field.name for field in fields(Phase)}:
        return False
    switches = [value for name, value in phase.items() if name != "name"]
    return isinstance(phase["name"], str) and all(type(value) is bool for value in switches)
