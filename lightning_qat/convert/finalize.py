"""A copy of the trained model whose quantizers hold final numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_qat.convert.capture import CaptureError
from lightning_qat.convert.final_weights import finalize_weights
from lightning_qat.function_hooks.hooks import hooks_of
from lightning_qat.ir.finite import STATISTICS, not_finite
from lightning_qat.joins.apply import forget_plan, plan_of
from lightning_qat.joins.first_forward import finish_plan
from lightning_qat.joins.held import held_by
from lightning_qat.layers import QATLayer
from lightning_qat.layers.quantized_weights import quantized_weights
from lightning_qat.model.forward import is_compiled_forward
from lightning_qat.model.paths import modules_by_path
from lightning_qat.model.torch_compile import plain_path, unwrapped
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.final import FinalActivation, UnknownRange
from lightning_qat.quantizers.names import tensor_key


def finalized_copy(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    """A deep copy in eval mode on the CPU whose quantizers hold final numbers.

    Args:
        model: The trained model.
        args: What ``forward`` takes by position.
        kwargs: What it takes by keyword.

    Raises:
        ValueError: As ``convert``.
    """
    finish_plan(model)
    if not _layers(model):
        raise ValueError(
            f"{type(model).__name__} has no QAT layers, so there is nothing to convert. Call "
            "prepare(model, recipe) and train first."
        )
    quantizers = tensor_keys(model)
    problems = _why_not_final({q: key for q, key in quantizers.items() if q.calibrated})
    problems += _weight_problems(model)
    if problems:
        # Whether the forward runs what has no range is not known yet.
        unknown = _why_not_final({q: key for q, key in quantizers.items() if not q.calibrated})
        raise ValueError(_not_final(unknown + problems + _other_problems(model)))
    final = detached_copy(model)
    return finalize_model(final, args, kwargs)


def refuse_broken_weights(model: nn.Module) -> None:
    """Refuse a model whose weights are not finite, as training in half precision leaves them.

    Raises:
        ValueError: All such layers are named.
    """
    problems = _weight_problems(model)
    if problems:
        raise ValueError(_not_final(problems))


def refuse_broken_constants(program: ExportedProgram) -> None:
    """Refuse a captured model whose biases, statistics or other constants are not finite.

    Raises:
        ValueError: All of them are named.
    """
    problems = not_finite(program)
    if problems:
        raise ValueError(_not_final(problems))


def _weight_problems(model: nn.Module) -> list[str]:
    problems = []
    for one in quantized_weights(model):
        if not bool(torch.isfinite(one.weight).all()):
            problems.append(f"{one.path}: its {one.name} is not finite")
        elif not one.quantizer.has_finite_scale(one.weight):
            problems.append(f"{one.path}: the learned scale of its {one.name} is not finite")
    return problems


def _other_problems(model: nn.Module) -> list[str]:
    """What else is not finite, of a model that is refused anyway; see ``not_finite``."""
    named = {id(one.weight) for one in quantized_weights(model)}
    values: list[tuple[str, Tensor]] = [
        *((name, p) for name, p in model.named_parameters() if id(p) not in named),
        *((name, b) for name, b in model.named_buffers() if name.endswith(STATISTICS)),
    ]
    return [
        f"{path or 'the model'}: its {own} is not finite"
        for (path, _, own), value in ((name.rpartition("."), v) for name, v in values)
        if "quantizer" not in path and not bool(torch.isfinite(value).all())
    ]


def _why_not_final(quantizers: Mapping[ActivationQuantizer, str]) -> list[str]:
    return [
        f"{key.removesuffix('.input')}: {why}"
        for quantizer, key in quantizers.items()
        if (why := quantizer.why_not_final) is not None
    ]


def refuse_unknown_ranges(model: nn.Module) -> None:
    """Refuse a captured model whose forward has run a quantizer that has no range.

    A layer without a range that the forward never runs is not in the graph, and no problem.

    Args:
        model: The finalized copy.

    Raises:
        ValueError: Such quantizers; all of them are named.
    """
    reached = {
        module.key: module.why
        for module in model.modules()
        if isinstance(module, UnknownRange) and module.reached
    }
    if reached:
        raise ValueError(
            _not_final([f"{key.removesuffix('.input')}: {why}" for key, why in reached.items()])
        )


def _not_final(problems: Sequence[str]) -> str:
    remedies = []
    if not all("not finite" in problem for problem in problems):
        remedies.append(
            "Train for at least one batch in which it runs, give it the range of inputs that you "
            "have with calibrate_unseen(model, inputs), or exclude its module"
        )
    if any("not finite" in problem for problem in problems):
        remedies.append(
            "What is not finite has diverged: lower the learning rate; in half precision Adam's "
            "eps is zero, so use precision='bf16-true' or a mixed one. An infinite constant, such "
            "as a mask, belongs in a buffer"
        )
    return (
        "Every quantized tensor needs an observed range, and ranges and weights must be finite. "
        f"{'; '.join(problems)}. {'. '.join(remedies)}."
    )


def tensor_keys(model: nn.Module) -> dict[ActivationQuantizer, str]:
    """Every activation quantizer and the key of its tensor; shared ones by their owner's name."""
    plan = plan_of(model)
    modules = modules_by_path(model)
    paths = [t.quantizer for t in plan.tensors] if plan is not None else []
    found: dict[ActivationQuantizer, str] = {}
    for path in (*paths, *modules):
        module = modules.get(path)
        if isinstance(module, ActivationQuantizer):
            found.setdefault(module, tensor_key(path))
    # A part of a planned model quantizes with what belongs to another part.
    for name, module in modules.items():
        hooks = hooks_of(module)
        for call, operands in hooks.plan.sites.items() if hooks else ():
            for index, quantizer in operands.items():
                if isinstance(quantizer, ActivationQuantizer):
                    place = "_".join((*re.findall(r"\w+", call), str(index)))
                    found.setdefault(quantizer, f"{name}.{place}" if name else place)
    return found


def detached_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model in eval mode on the CPU, without ``torch.compile`` and gradients.

    Raises:
        CaptureError: A part is TorchScript.
    """
    scripted = [name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise CaptureError(
            f"torch.export does not look into TorchScript: {scripted[0]!r} is a "
            f"{type(model.get_submodule(scripted[0])).__name__}. Training does not mind; to "
            "export, use the module that was scripted, as it was before torch.jit.script."
        )
    # Hooks such as weight_norm's leave tensors with a graph on a module; deepcopy refuses those.
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in computed}
    return _without_compile(copy.deepcopy(model, memo)).cpu().eval().requires_grad_(False)


def _without_compile(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` wrapped, at every level, in place."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    module = unwrapped(module)
    if is_compiled_forward(vars(module).get("forward")):
        # Lightning's, which runs the module that was copied.
        del module.forward
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _without_compile(child)
    return module


def finalize_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    """Replace every quantizer of a model by its final form, in place; the plan is forgotten.

    Args:
        model: A copy in eval mode on the CPU.
        args: What ``forward`` takes by position.
        kwargs: What it takes by keyword.
    """
    finals: dict[Any, Any] = {**finalize_weights(model, args, kwargs)}
    finals |= {q: _final(q, key) for q, key in tensor_keys(model).items()}
    replace_quantizers(model, finals)
    forget_plan(model)
    return model.eval()


def replace_quantizers(model: nn.Module, replacements: Mapping[Any, Any]) -> None:
    """Put other modules into the place of quantizers, wherever a model calls them; in place.

    Args:
        model: A prepared model.
        replacements: Quantizer to what stands in for it; others stay.
    """
    for layer in _layers(model).values():
        for child in layer.activation_quantizer_names():
            quantizer = getattr(layer, child)
            if isinstance(quantizer, ActivationQuantizer):
                setattr(layer, child, replacements.get(quantizer, quantizer))
    for module in model.modules():
        joins: Any = held_by(module) or {}
        for name, quantizer in joins.items():
            joins[name] = replacements.get(quantizer, quantizer)
        hooks = hooks_of(module)
        for operands in hooks.plan.sites.values() if hooks else ():
            operands.update({k: replacements.get(q, q) for k, q in operands.items()})


def _final(quantizer: ActivationQuantizer, key: str) -> FinalActivation | UnknownRange:
    if quantizer.calibrated:
        return FinalActivation(quantizer.qparams(), key)
    return UnknownRange(key, quantizer.why_unknown)


def _layers(model: nn.Module) -> dict[str, QATLayer]:
    return {
        plain_path(name): module
        for name, module in model.named_modules()
        if isinstance(module, QATLayer)
    }
