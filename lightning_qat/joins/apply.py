"""Which quantizer serves which tensor of a model: plain data, and how it is put into a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lightning_qat.function_hooks.frame import caller_of
from lightning_qat.function_hooks.hooks import ModuleHooks, hooks_of
from lightning_qat.joins.code import code_problem
from lightning_qat.joins.held import hold_joins, load_held_last
from lightning_qat.joins.plan import JoinPlan, PlannedTensor
from lightning_qat.layers import QATLayer
from lightning_qat.model.attributes import PLAN_HANDLES, PLAN_KEEPER
from lightning_qat.model.paths import ModelPaths
from lightning_qat.model.torch_compile import trace_hooks
from lightning_qat.quantizers import names
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.factory import activation_quantizer
from lightning_qat.quantizers.stored_values import from_tensor, to_tensor
from lightning_qat.quantizers.switches import switch_like
from lightning_qat.quantizers.weight import WeightQuantizer


def apply_plan(model: nn.Module, plan: JoinPlan, paths: ModelPaths | None = None) -> None:
    """Give a model the quantizers of a plan and watch over the modules that make planned calls.

    Args:
        model: The model that the plan was made for, with its QAT layers; changed in place. A plan
            that it has already is replaced, but quantizers whose spec stays keep their ranges.
        plan: The plan.
        paths: The model's present paths, where the caller has them.

    Raises:
        ValueError: The plan names modules that the model does not have.
    """
    paths = paths or ModelPaths.of(model)
    modules = paths.by_path
    like = next((m for m in modules.values() if isinstance(m, ActivationQuantizer)), None)
    named = {*plan.sites, *plan.links, *(names.owner_path(t.quantizer) for t in plan.tensors)}
    unknown = sorted(path for path in named if path not in modules)
    if unknown:
        raise ValueError(
            f"The plan of quantized tensors names {unknown}, which {type(model).__name__} does not "
            "have. Build the model that was trained."
        )
    for unreached in plan.unreached:
        never_run = modules.get(unreached)
        if isinstance(never_run, QATLayer):
            never_run.unswap()
    quantizers = {t.quantizer: _placed(modules, t, like) for t in plan.tensors}
    quantizers |= _weights_of_layers(modules, plan, quantizers)
    for layer, path in plan.links.items():
        setattr(modules[layer], names.INPUT, quantizers[path])
    for path, calls in plan.sites.items():
        sites = {
            call: {int(k): quantizers[q] for k, q in operands.items()}
            for call, operands in calls.items()
        }
        hooks = ModuleHooks(path, sites)
        hooks.plan.compact = like is not None and like.compact
        hooks.attach(modules[path])
    callers = {caller_of(call) for calls in plan.sites.values() for call in calls}
    watch_layers(model, paths, {caller for caller in callers if caller is not None})
    keep_plan(model, plan)


def watch_layers(
    model: nn.Module, paths: ModelPaths | None = None, callers: Collection[str] = ()
) -> None:
    """Hook the modules around the layers, so that relus there are fused; see ``relu_fusion``.

    Args:
        model: The model.
        paths: Its present paths, where the caller has them.
        callers: Further modules, which tell the runs of other modules apart.
    """
    modules = (paths or ModelPaths.of(model)).by_path
    owners = {path.rpartition(".")[0] for path, module in modules.items() if _quantizes(module)}
    owners |= {caller for caller in callers if caller in modules}
    around = {owner[:end] for owner in owners for end, c in enumerate(f"{owner}.") if c == "."}
    for path in sorted({"", *around} if owners else ()):
        if hooks_of(modules[path]) is None and not _quantizes(modules[path]):
            ModuleHooks(path, {}).attach(modules[path])
    trace_hooks(model)


def _quantizes(module: nn.Module) -> bool:
    return isinstance(getattr(module, names.INPUT, None), ActivationQuantizer)


def _placed(
    modules: Mapping[str, nn.Module], tensor: PlannedTensor, like: ActivationQuantizer | None
) -> Any:
    owner: Any = modules[names.owner_path(tensor.quantizer)]
    name = tensor.quantizer.rpartition(".")[2]
    joins: Any = None
    wanted = tensor.spec if tensor.weight is None else tensor.weight.spec
    if name == names.INPUT:
        found: Any = getattr(owner, name)
    else:
        joins = hold_joins(owner)
        found = joins[name] if name in joins else None
    if isinstance(found, Quantizer) and found.spec == wanted:
        return found
    quantizer = _new(modules, tensor).train(owner.training)
    quantizer.place = names.place(tensor.quantizer)
    if like is not None and isinstance(quantizer, ActivationQuantizer):
        quantizer.to(like.min_val.device)
        switch_like(quantizer, like)
    if name == names.INPUT:
        setattr(owner, name, quantizer)
    else:
        joins[name] = quantizer
    return quantizer


def _new(modules: Mapping[str, nn.Module], tensor: PlannedTensor) -> Quantizer:
    if tensor.weight is None:
        return activation_quantizer(tensor.spec)
    quantizer = WeightQuantizer(tensor.weight.spec, tensor.weight.axis, tensor.weight.groups)
    like = next((m for m in modules.values() if isinstance(m, WeightQuantizer)), None)
    if like is not None:
        switch_like(quantizer, like)
    return quantizer


def _weights_of_layers(
    modules: Mapping[str, nn.Module], plan: JoinPlan, planned: Collection[str]
) -> dict[str, Any]:
    """The weight quantizers of layers whose weight a product reads, by their paths."""
    called = {q for calls in plan.sites.values() for o in calls.values() for q in o.values()}
    found = {path: modules[path] for path in called.difference(planned)}
    for quantizer in found.values():
        assert isinstance(quantizer, WeightQuantizer)
        quantizer.shared = True
    return found


class _PlanKeeper:
    """Writes a model's plan into its state_dict, and follows the plan of one that is loaded."""

    def __init__(self, plan: JoinPlan | None) -> None:
        self.plan = plan

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        if self.plan is not None:
            state_dict[prefix + names.PLAN] = to_tensor(self.plan.to_dict())

    def load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.pop(prefix + names.PLAN, None)
        if stored is None:
            if self.plan is not None and _is_from_before_its_plan(state_dict, prefix):
                _drop_unreached(state_dict, prefix, self.plan, None)
                _start_anew(module, self.plan, state_dict, prefix)
            return
        plan = JoinPlan.from_dict(from_tensor(stored, prefix + names.PLAN))
        problem = code_problem(ModelPaths.of(module).by_path, plan.code)
        if problem is not None:
            # torch tells hooks of no strict=False; it forgives keys then, and nothing else.
            _, _, _, unexpected, _ = args
            unexpected.append(f"{prefix}{names.PLAN}: {problem}")
        if self.plan != plan:
            _drop_unreached(state_dict, prefix, self.plan, plan)
            apply_plan(module, plan)


def _drop_unreached(
    state_dict: dict[str, Any], prefix: str, own: JoinPlan | None, stored: JoinPlan | None
) -> None:
    """Drop the quantizers of layers that the model's own plan has made float again."""
    gone = {*(own.unreached if own else ())} - {*(stored.unreached if stored else ())}
    for path in (f"{prefix}{layer}." for layer in gone):
        for key in [key for key in state_dict if key.startswith(path)]:
            if names.quantizer_role(key.removeprefix(path).partition(".")[0]) is not None:
                del state_dict[key]


def _is_from_before_its_plan(state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Whether a state without a plan is of a QAT model whose first forward was still to come."""
    paths = map(names.quantizer_of_key, state_dict)
    own = [path for path in paths if path is not None and path.startswith(prefix)]
    batches = [state_dict.get(f"{path}.batches") for path in own]
    return bool(own) and not any(float(b) for b in batches if b is not None)


def _start_anew(module: nn.Module, plan: JoinPlan, state_dict: dict[str, Any], prefix: str) -> None:
    """Have the quantizers of a plan load what they had before the first batch.

    A learning-rate or batch-size search restores such a state after batches that made the plan.
    """
    paths = {tensor.quantizer for tensor in plan.tensors}
    planned = {module.get_submodule(path) for path in paths}
    modules = module.named_modules(remove_duplicate=False)
    for path, quantizer in modules:
        if quantizer in planned:
            assert isinstance(quantizer, ActivationQuantizer)
            new = activation_quantizer(quantizer.spec).state_dict(prefix=f"{prefix}{path}.")
            state_dict.update(new)


def keep_plan(model: nn.Module, plan: JoinPlan | None) -> None:
    """Let a model's state_dict carry its plan; ``None``: only follow a plan that is loaded."""
    keeper = model.__dict__.get(PLAN_KEEPER)
    if keeper is None:
        keeper = _PlanKeeper(plan)
        model.__dict__[PLAN_KEEPER] = keeper
        model.__dict__[PLAN_HANDLES] = (
            model.register_state_dict_post_hook(keeper),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_pre_hook(keeper.load),  # type: ignore[no-untyped-call]
        )
        load_held_last(model)
    keeper.plan = plan


def plan_of(model: nn.Module) -> JoinPlan | None:
    """The plan that a model follows."""
    keeper: _PlanKeeper | None = model.__dict__.get(PLAN_KEEPER)
    return None if keeper is None else keeper.plan


def forget_plan(model: nn.Module) -> None:
    """Take the plan out of a model's state_dict; the model goes on following it."""
    for handle in model.__dict__.pop(PLAN_HANDLES, ()):
        handle.remove()
    model.__dict__.pop(PLAN_KEEPER, None)
