"""Capture a model's forward with ``torch.export``, with a dynamic batch where it allows one."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from lightning_qat.convert.batch_check import has_dynamic_input, settle_sizes, takes_other_batches
from lightning_qat.convert.module_paths import use_module_paths
from lightning_qat.function_hooks.running import forget_running
from lightning_qat.out_of_memory import memory_error_in


class CaptureError(RuntimeError):
    """``torch.export`` could not turn the model's forward into a graph."""


def capture_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ExportedProgram:
    """Export with a dynamic batch where the model allows it, else as the inputs are."""
    # A recurrent layer's batch may be the second dimension, and is that of its state.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    axes = (0, 1) if recurrent else (0,)
    fixed = None
    for axis in axes:
        program, grown = _capture_batch(model, args, kwargs, axis, axes)
        if program is not None and has_dynamic_input(program):
            if takes_other_batches(program):
                return program
            program = None
        fixed = fixed or (None if grown else program)
    return fixed or export_program(model, args, kwargs, None)


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
        # torch.export wants the dynamic shapes by parameter: those of *args in a tuple.
        with _named_keywords(model, kwargs):
            signature = inspect.signature(model.forward)
        by_parameter = signature.bind(*dynamic[0], **dynamic[1]).arguments
        return export_program(model, grown[0], grown[1], dict(by_parameter)), grows
    except CaptureError:
        # The batch may be the very thing that the forward cannot take as dynamic.
        return None, grows


def export_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> ExportedProgram:
    """Capture the forward with ``torch.export``, non-strict.

    Args:
        model: The model, in eval mode.
        args: Positional inputs.
        kwargs: Keyword inputs.
        dynamic: The dynamic shapes as ``torch.export.export`` takes them; ``None`` fixes every
            size.

    Raises:
        CaptureError: The forward cannot be captured; the message names the module and the line.
    """
    with (
        _named_keywords(model, kwargs),
        _running_module(model) as running,
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        # What a hook computes and puts on its module (weight_norm) is read in the same forward; a
        # float recurrent layer keeps a list of its weights.
        warnings.filterwarnings(
            "ignore", "The tensor attributes? .* (was|were) assigned during export"
        )
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            forget_running()
            if memory_error_in(error) is not None:
                raise  # Whoever asked for the capture says what ran out.
            where = running[-1] if running else "the model's forward"
            raise CaptureError(
                f"torch.export could not capture {type(model).__name__}.forward: it failed in "
                f"{where}{_user_line(error)} with {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}. "
                "Training does not need the capture; export does. Replace Python control flow on "
                "tensor values (torch.where, torch.cond), or wrap that part in an operator of "
                "your own (torch.library.custom_op)."
            ) from error
    use_module_paths(program, model)
    settle_sizes(program)
    return program


@contextmanager
def _named_keywords(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Let ``forward(self, **kwargs)`` look as if it named the keywords that it is given.

    torch 2.13 takes no dynamic shapes for those that it does not name.
    """
    function: Any = type(model).forward
    signature = inspect.signature(function)
    named = [p for p in signature.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    if len(named) == len(signature.parameters):
        yield
        return
    own = vars(function).get("__signature__")
    further = kwargs.keys() - {parameter.name for parameter in named}
    named += [Parameter(name, Parameter.KEYWORD_ONLY) for name in kwargs if name in further]
    function.__signature__ = signature.replace(parameters=named)
    try:
        yield
    finally:
        if own is None:
            del function.__signature__
        else:
            function.__signature__ = own


@contextmanager
def _running_module(model: nn.Module) -> Iterator[list[str]]:
    """The stack of modules whose forward is running; left as it stood when one raised."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
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
    own = Path(__file__).parents[1]
    torch_folder = Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        inside = own in path.parents or torch_folder in path.parents
        if not inside and not frame.filename.startswith("<"):
            return f" ({path.name}, line {frame.lineno}: {frame.line})"
    return ""
