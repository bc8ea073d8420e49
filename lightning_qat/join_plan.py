"""Which quantizer serves which tensor of a model: plain data, and how it is put into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lightning_qat.compiled import modules_by_path, trace_hooks
from lightning_qat.interception import Interception, interception_of
from lightning_qat.learned_quantizers import activation_quantizer
from lightning_qat.quantizers import ActivationQuantizer
from lightning_qat.recipe import ActivationSpec

STATE_KEY = "_qat_plan"
"""Where a model's state_dict holds its plan."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor (or several tied ones) with one quantizer.

    Args:
        quantizer: Dotted path of the quantizer.
        spec: Its spec.
        producers: What makes the tensors: a module path and a function, or ``input``.
        consumers: Where they are quantized: layers, joins (``block.add:0[1]``) and outputs.
    """

    quantizer: str
    spec: ActivationSpec
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class JoinPlan:
    """Every quantized tensor of a model. ``print`` shows a table.

    Args:
        tensors: In the order of the forward.
        sites: Module path to call (``add@forward+3:0``, a line of its forward) to operand number
            to quantizer path; calls that stay float have no operands.
        links: Layer path to the path of the quantizer that it shares.
        left_float: Calls that stay float, and why.
    """

    tensors: tuple[PlannedTensor, ...]
    sites: Mapping[str, Mapping[str, Mapping[str, str]]]
    links: Mapping[str, str]
    left_float: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Primitives, for checkpoints."""
        return {
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "sites": {m: {c: dict(o) for c, o in s.items()} for m, s in self.sites.items()},
            "links": dict(self.links),
            "left_float": list(self.left_float),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> JoinPlan:
        """Read what ``to_dict`` gave."""
        tensors = tuple(
            PlannedTensor(
                t["quantizer"],
                ActivationSpec(**t["spec"]),
                tuple(t["producers"]),
                tuple(t["consumers"]),
            )
            for t in values["tensors"]
        )
        return cls(tensors, values["sites"], values["links"], tuple(values["left_float"]))

    def __str__(self) -> str:
        """One line per quantized tensor."""
        lines = [f"{len(self.tensors)} tensors quantized, {len(self.left_float)} calls left float"]
        for tensor in self.tensors:
            lines.append(
                f"  {', '.join(tensor.producers) or 'input'} -> {tensor.quantizer} "
                f"({_spec(tensor.spec)}) -> {', '.join(tensor.consumers)}"
            )
        lines += [f"  left float: {call}" for call in self.left_float]
        return "\n".join(lines)

    def mermaid(self) -> str:
        """The plan as a Mermaid flow chart: producers, quantizers, consumers."""
        lines = ["flowchart TD"]
        for number, tensor in enumerate(self.tensors):
            lines.append(f'  q{number}(["{tensor.quantizer}<br/>{_spec(tensor.spec)}"])')
            lines += [f"  {_node(p)} --> q{number}" for p in tensor.producers or ("input",)]
            lines += [f"  q{number} --> {_node(c)}" for c in tensor.consumers]
        return "\n".join(lines) + "\n"


def _spec(spec: ActivationSpec) -> str:
    text = f"{spec.bits} bits"
    if spec.clip is not None:
        return f"{text}, {spec.clip[0]:g} .. {spec.clip[1]:g}"
    return f"{text}, from 0" if spec.fixed_min else text


def _node(name: str) -> str:
    letters = "".join(c if c.isalnum() else "_" for c in name)
    return f'n_{letters}["{name}"]'


def apply_plan(model: nn.Module, plan: JoinPlan) -> None:
    """Give a model the quantizers of a plan and watch over the modules that make planned calls.

    Args:
        model: The model that the plan was made for, with its QAT layers; changed in place. A plan
            that it has already is replaced, but quantizers whose spec stays keep their ranges.
        plan: The plan.

    Raises:
        ValueError: The plan names modules that the model does not have.
    """
    modules = modules_by_path(model)
    like = next((m for m in modules.values() if isinstance(m, ActivationQuantizer)), None)
    paths = {*plan.sites, *plan.links, *(_owner(t.quantizer) for t in plan.tensors)}
    unknown = sorted(path for path in paths if path not in modules)
    if unknown:
        raise ValueError(
            f"The plan of quantized tensors names {unknown}, which {type(model).__name__} does not "
            "have. Build the model that was trained."
        )
    quantizers = {t.quantizer: _placed(modules, t, like) for t in plan.tensors}
    for layer, path in plan.links.items():
        modules[layer].input_quantizer = quantizers[path]
    for path, calls in plan.sites.items():
        sites = {
            call: {int(k): quantizers[q] for k, q in operands.items()}
            for call, operands in calls.items()
        }
        interception = Interception(path, sites)
        interception.compact = like is not None and like.compact
        interception.attach(modules[path])
    watch_layers(model)
    keep_plan(model, plan)


def watch_layers(model: nn.Module) -> None:
    """Watch over what is around the layers, where nothing need be quantized; see ``relus``."""
    paths = modules_by_path(model)
    owners = {path.rpartition(".")[0] for path, module in paths.items() if _quantizes(module)}
    around = {owner[:end] for owner in owners for end, c in enumerate(f"{owner}.") if c == "."}
    for path in sorted({"", *around} if owners else ()):
        if interception_of(paths[path]) is None and not _quantizes(paths[path]):
            Interception(path, {}).attach(paths[path])
    trace_hooks(model)


def _quantizes(module: nn.Module) -> bool:
    return isinstance(getattr(module, "input_quantizer", None), ActivationQuantizer)


def _owner(quantizer: str) -> str:
    """Path of the module that holds a quantizer."""
    owner = quantizer.rpartition(".")[0]
    return owner.removesuffix("qat_joins").removesuffix(".")


def _placed(
    modules: Mapping[str, nn.Module], tensor: PlannedTensor, like: ActivationQuantizer | None
) -> ActivationQuantizer:
    owner: Any = modules[_owner(tensor.quantizer)]
    name = tensor.quantizer.rpartition(".")[2]
    joins: Any = None
    if name == "input_quantizer":
        found: Any = owner.input_quantizer
    else:
        if "qat_joins" not in owner._modules:
            owner.add_module("qat_joins", nn.ModuleDict())
        joins = owner.qat_joins
        found = joins[name] if name in joins else None
    if isinstance(found, ActivationQuantizer) and found.spec == tensor.spec:
        return found
    quantizer = activation_quantizer(tensor.spec)
    if like is not None:
        quantizer.to(like.min_val.device)
        quantizer.train(like.training)
        quantizer.observing, quantizer.quantizing = like.observing, like.quantizing
        quantizer.deferred, quantizer.compact = like.deferred, like.compact
    if name == "input_quantizer":
        owner.input_quantizer = quantizer
    else:
        joins[name] = quantizer
    return quantizer


class _PlanKeeper:
    """Writes a model's plan into its state_dict, and follows the plan of one that is loaded."""

    def __init__(self, plan: JoinPlan | None) -> None:
        self.plan = plan

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        if self.plan is not None:
            state_dict[prefix + STATE_KEY] = self.plan.to_dict()

    def load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.pop(prefix + STATE_KEY, None)
        if stored is not None and (self.plan is None or self.plan.to_dict() != stored):
            apply_plan(module, JoinPlan.from_dict(stored))


def keep_plan(model: nn.Module, plan: JoinPlan | None) -> None:
    """Let a model's state_dict carry its plan; ``None``: only follow a plan that is loaded."""
    keeper = model.__dict__.get("_qat_plan_keeper")
    if keeper is None:
        keeper = _PlanKeeper(plan)
        model.__dict__["_qat_plan_keeper"] = keeper
        model.__dict__["_qat_plan_handles"] = (
            model.register_state_dict_post_hook(keeper),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_pre_hook(keeper.load),  # type: ignore[no-untyped-call]
        )
    keeper.plan = plan


def plan_of(model: nn.Module) -> JoinPlan | None:
    """The plan that a model follows."""
    keeper: _PlanKeeper | None = model.__dict__.get("_qat_plan_keeper")
    return None if keeper is None else keeper.plan


def forget_plan(model: nn.Module) -> None:
    """Take the plan out of a model's state_dict; the model goes on following it."""
    for handle in model.__dict__.pop("_qat_plan_handles", ()):
        handle.remove()
    model.__dict__.pop("_qat_plan_keeper", None)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
