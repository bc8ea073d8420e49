"""From a trained QAT model to final numbers in one graph. The live model is never touched."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from lightning_qat.compiled import modules_by_path, plain_path, unwrapped
from lightning_qat.discovery import finish_plan
from lightning_qat.fold import fold_batchnorms
from lightning_qat.interception import interception_of, unwind
from lightning_qat.join_plan import forget_plan, plan_of
from lightning_qat.layers import QATLayer, weight_quantizer_name
from lightning_qat.program import settle
from lightning_qat.quantized_model import Inputs, QuantizedModel, as_call
from lightning_qat.quantizers import (
    ActivationQuantizer,
    FinalActivation,
    FinalWeight,
    WeightQuantizer,
)
from lightning_qat.recipe import Recipe


class CaptureError(RuntimeError):
    """``torch.export`` could not turn the model's forward into a graph."""


def convert(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    recipe: Recipe | None = None,
    dynamic_batch: bool = True,
) -> QuantizedModel:
    """Make the numbers of a trained QAT model final and capture its graph.

    Works on a deep copy on the CPU in eval mode: integers are rounded once, batch norm is folded
    into the layer before it, and ``torch.export`` (non-strict) captures ``forward``. The size of
    the first dimension that the inputs share is kept dynamic where the model allows it; of a model
    with recurrent layers that of the second, where that is the batch. Their loop over time steps
    is unrolled for the length of the example.

    Args:
        model: A model that ``prepare`` changed and that has seen training batches.
        example_inputs: What ``forward`` takes: a tensor, a tuple of positional arguments or a
            mapping of keyword arguments, nested as it likes.
        recipe: The recipe, kept in the result for the record.
        dynamic_batch: False gives every dimension the size that it has in ``example_inputs``.

    Returns:
        The neutral description that exporters read.

    Raises:
        ValueError: The model has no QAT layers, or layers whose range was never observed or whose
            weights are not finite; all of them are named.
        CaptureError: ``forward`` cannot be captured; the message says in which module and line.
    """
    args, kwargs = as_call(example_inputs)
    final = finalized_copy(model)
    capture = _capture if dynamic_batch else partial(_export, dynamic=None)
    program = capture(final, args, kwargs)
    saturated = fold_batchnorms(program)
    for key, count in saturated.items():
        warnings.warn(
            f"{key}: {count} integers of the folded weight saturate at 127, because the batch "
            "norm after it has negative factors and the grid -128..127 has no +128. The recipe's "
            "quantizer='minmax' folds exactly.",
            stacklevel=2,
        )
    settle(program)
    return QuantizedModel(
        program,
        _input_names(program),
        _output_names(program),
        {} if recipe is None else recipe.to_dict(),
    )


def check_capture(model: nn.Module, example_inputs: Inputs) -> None:
    """Find out before training whether ``convert`` will be able to capture the model.

    Args:
        model: A prepared model; it need not be calibrated.
        example_inputs: As for ``convert``.

    Raises:
        CaptureError: It will not; the message says in which module and line.
    """
    args, kwargs = as_call(example_inputs)
    final = _detached_copy(model)
    for quantizer in _keys(final):
        quantizer.calibrated = True
    _capture(_finalize(final), args, kwargs)


def finalized_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode on the CPU whose quantizers hold final numbers.

    Raises:
        ValueError: As ``convert``.
    """
    finish_plan(model)
    layers = _layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no QAT layers, so there is nothing to convert. Call "
            "prepare(model, recipe) and train first."
        )
    problems = [
        f"{key.removesuffix('.input')}: {why}"
        for quantizer, key in _keys(model).items()
        if (why := quantizer.why_not_final) is not None
    ]
    for name, layer in layers.items():
        for weight in layer.weight_names(layer):
            quantizer = getattr(layer, weight_quantizer_name(weight))
            if not isinstance(quantizer, WeightQuantizer):
                continue
            if not bool(torch.isfinite(getattr(layer, weight)).all()):
                problems.append(f"{name}: its {weight} is not finite")
            elif not quantizer.has_finite_scale(getattr(layer, weight)):
                problems.append(f"{name}: the learned scale of its {weight} is not finite")
    if problems:
        raise ValueError(
            "Every quantized tensor needs an observed range, and ranges and weights must be "
            "finite. "
            + "; ".join(problems)
            + ". Train for at least one batch in which it runs, or exclude its module."
        )
    return _finalize(_detached_copy(model))


def _keys(model: nn.Module) -> dict[ActivationQuantizer, str]:
    """Every activation quantizer and the key of its tensor; shared ones by their owner's name."""
    plan = plan_of(model)
    modules = modules_by_path(model)
    paths = [t.quantizer for t in plan.tensors] if plan is not None else []
    found: dict[ActivationQuantizer, str] = {}
    for path in (*paths, *modules):
        module = modules.get(path)
        if isinstance(module, ActivationQuantizer):
            owner, dot, name = path.replace("qat_joins.", "").rpartition(".")
            found.setdefault(module, f"{owner}{dot}{name.replace('_quantizer', '')}")
    # A part of a planned model quantizes with what belongs to another part.
    for name, module in modules.items():
        interception = interception_of(module)
        for call, operands in interception.sites.items() if interception else ():
            for index, quantizer in operands.items():
                if isinstance(quantizer, ActivationQuantizer):
                    place = f"{call.replace(':', '_')}_{index}"
                    found.setdefault(quantizer, f"{name}.{place}" if name else place)
    return found


def _detached_copy(model: nn.Module) -> nn.Module:
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
    module = unwrapped(module)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _without_compile(child)
    return module


def _finalize(model: nn.Module) -> nn.Module:
    finals = {q: FinalActivation(q.qparams(), key) for q, key in _keys(model).items()}
    for name, layer in _layers(model).items():
        for child in layer.activation_quantizer_names():
            quantizer = getattr(layer, child)
            if isinstance(quantizer, ActivationQuantizer):
                setattr(layer, child, finals[quantizer])
        for weight in layer.weight_names(layer):
            child = weight_quantizer_name(weight)
            value, quantizer = getattr(layer, weight), getattr(layer, child)
            if isinstance(quantizer, WeightQuantizer):
                key = f"{name}.{weight}" if name else weight
                final = FinalWeight.from_weight(value, quantizer.qparams(value), key)
                setattr(layer, child, final)
    for module in model.modules():
        if "qat_joins" in module._modules:
            joins: Any = module._modules["qat_joins"]
            for name, quantizer in joins.items():
                joins[name] = finals[quantizer]
        interception = interception_of(module)
        for operands in interception.sites.values() if interception else ():
            operands.update({k: finals.get(q, q) for k, q in operands.items()})  # type: ignore[call-overload]
    forget_plan(model)
    return model.eval()


def _layers(model: nn.Module) -> dict[str, QATLayer]:
    return {
        plain_path(name): module
        for name, module in model.named_modules()
        if isinstance(module, QATLayer)
    }


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """Export with a dynamic batch where the model allows it, else as the inputs are."""
    # A recurrent layer's batch may be the second dimension, and is that of its state.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    axes = (0, 1) if recurrent else (0,)
    fixed = None
    for axis in axes:
        program, grown = _capture_batch(model, args, kwargs, axis, axes)
        if program is not None and _has_dynamic_input(program):
            return program
        fixed = fixed or (None if grown else program)
    return fixed or _export(model, args, kwargs, None)


def _capture_batch(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axis: int,
    axes: tuple[int, ...],
) -> tuple[ExportedProgram | None, bool]:
    """Export with the first input's ``axis`` as the batch, dynamic wherever its size stands.

    Returns:
        The program, ``None`` where that cannot be exported, and whether the batch was shown larger
        than it is.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    batch = tensors[0].shape[axis] if tensors and tensors[0].dim() > axis else 0
    grows = batch == 1

    def batch_axes(leaf: object, size: int) -> list[int]:
        """Where a leaf has the batch, the likeliest axis first."""
        candidates = sorted(axes, key=lambda other: other != axis)
        return [
            a
            for a in candidates
            if isinstance(leaf, Tensor) and leaf.dim() > a and leaf.shape[a] == size
        ]

    def shown(leaf: Any) -> Any:
        # A size of 1 is always taken literally by torch.export, so the batch is shown as 2.
        found = batch_axes(leaf, batch) if grows else []
        return torch.cat((leaf, leaf), found[0]) if found else leaf

    grown = pytree.tree_map(shown, (args, kwargs))
    size = 2 if grows else batch
    dynamic = pytree.tree_map(
        lambda leaf: {a: Dim.AUTO for a in batch_axes(leaf, size)} or None, grown
    )
    try:
        return _export(model, grown[0], grown[1], dynamic), grows
    except CaptureError:
        # The batch may be the very thing that the forward cannot take as dynamic.
        return None, grows


def _has_dynamic_input(program: ExportedProgram) -> bool:
    names = set(program.graph_signature.user_inputs)
    return any(
        bool(free_symbols(size))
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
        for size in getattr(node.meta.get("val"), "shape", ())
    )


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> ExportedProgram:
    # torch.export wants the dynamic shapes by argument, as the call has them.
    shapes = dynamic and (dynamic[1] or dynamic[0])
    with _running_module(model) as running, torch.no_grad(), warnings.catch_warnings():
        # What a hook computes and puts on its module (weight_norm) is read in the same forward; a
        # float recurrent layer keeps a list of its weights.
        warnings.filterwarnings(
            "ignore", "The tensor attributes? .* (was|were) assigned during export"
        )
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            unwind()
            where = running[-1] if running else "the model's forward"
            raise CaptureError(
                f"torch.export could not capture {type(model).__name__}.forward: it failed in "
                f"{where}{_user_line(error)} with {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}. "
                "Training does not need the capture; export does. Replace Python control flow on "
                "tensor values (torch.where, torch.cond), or wrap that part in an operator of "
                "your own (torch.library.custom_op)."
            ) from error


@contextmanager
def _running_module(model: nn.Module) -> Iterator[list[str]]:
    """The stack of modules whose forward is running; left as it stood when one raised."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        label = f"module {name!r} ({type(module).__name__})" if name else "the root's own forward"

        def enter(_module: nn.Module, _args: Any, label: str = label) -> None:
            stack.append(label)

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            stack.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _user_line(error: BaseException) -> str:
    """`` (file, line 12: code)`` of the innermost frame outside torch and this package."""
    own = Path(__file__).parent
    torch_folder = Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        inside = own in path.parents or torch_folder in path.parents
        if not inside and not frame.filename.startswith("<"):
            return f" ({path.name}, line {frame.lineno}: {frame.line})"
    return ""


def _input_names(program: ExportedProgram) -> tuple[str, ...]:
    tensors = {
        node.name
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
    }
    return tuple(str(n) for n in program.graph_signature.user_inputs if n in tensors)


def _output_names(program: ExportedProgram) -> tuple[str, ...]:
    """Names from where a tensor stands in the output: ``logits``, ``boxes_0``, or ``output``."""
    out_spec: Any = program.call_spec.out_spec
    values: Any = program.graph.output_node().args[0]
    slots = pytree.tree_unflatten(list(range(out_spec.num_leaves)), out_spec)
    # Runtimes tell inputs and outputs apart by name.
    taken, names = set(_input_names(program)), []
    for path, slot in pytree.tree_flatten_with_path(slots)[0]:
        if not isinstance(values[slot], torch.fx.Node):
            continue
        parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path]
        name = "_".join(parts) or "output"
        if name[0].isdigit() or name in taken:
            name = f"output_{name}"
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return tuple(names)
