"""Private parts of torch that eager training needs, one function each.

Each function says what happens on a torch that lacks the private part;
``tests/test_torch_private.py`` takes each part away. What torch.compile needs is in
``torch_compile.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import checkpoint

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_Function = Callable[..., Any]
_WRAPPED = "_lightning_qat_wrapped"


def saved_tensors_are_hooked() -> bool:
    """Whether hooks decide what autograd saves, as activation checkpointing does.

    Uses ``torch._C._autograd._top_saved_tensors_default_hooks``. Without it the answer is always
    True: numbers stay the same, but relu is never fused with a quantizer, and a plan that is made
    in the first training forward is applied one forward later.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # pyright: ignore
    return top is None or top(False) is not None


def may_run_again() -> bool:
    """Whether backward may run what runs now a second time, as activation checkpointing does.

    Without a gradient a forward may be a checkpointed one of the older kind. While torch.compile
    traces, the answer is False: what it runs again is a matter of its graph.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    return not torch.is_grad_enabled() or saved_tensors_are_hooked()


def autograd_context() -> tuple[object, bool]:
    """What autograd does with the calls of this moment, to be compared with ``==``.

    Whatever saves tensors by hooks of its own (activation checkpointing) or without a gradient may
    run a second time, in backward, where nothing is known that was computed outside: knowledge
    holds within one context. Uses ``torch._C._autograd._top_saved_tensors_default_hooks``. Without
    it no two contexts are equal: numbers stay the same, but a tensor that several layers read is
    quantized by each.
    """
    if torch.compiler.is_dynamo_compiling():
        return None, torch.is_grad_enabled()
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # pyright: ignore
    return object() if top is None else top(False), torch.is_grad_enabled()


def wrap_checkpointed_functions(wrap: Callable[[_Function], _Function]) -> None:
    """Have ``torch.utils.checkpoint`` run ``wrap(function)`` where it runs a function again.

    ``wrap`` is called before the function's first run, which stays as it is; a second call of this
    function changes nothing. Uses ``_checkpoint_without_reentrant_generator`` and
    ``CheckpointFunction`` of ``torch.utils.checkpoint``. Without them the calls that a checkpointed
    function makes itself, outside the modules that it runs, are not quantized in backward.
    """
    generator = getattr(checkpoint, "_checkpoint_without_reentrant_generator", None)
    if generator is not None and not hasattr(generator, _WRAPPED):

        def without_reentrant(function: _Function, *args: Any, **kwargs: Any) -> Any:
            return generator(wrap(function), *args, **kwargs)

        setattr(without_reentrant, _WRAPPED, True)
        checkpoint.__dict__["_checkpoint_without_reentrant_generator"] = without_reentrant
    reentrant: Any = getattr(checkpoint, "CheckpointFunction", None)
    if reentrant is not None and not hasattr(reentrant, _WRAPPED):
        original = reentrant.forward

        def forward(ctx: Any, function: _Function, *args: Any) -> Any:
            again = wrap(function)
            outputs = original(ctx, function, *args)
            ctx.run_function = again
            return outputs

        reentrant.forward = staticmethod(forward)
        setattr(reentrant, _WRAPPED, True)


def is_in_backward() -> bool:
    """Whether autograd runs a backward pass now, in which checkpointed forwards run again.

    Uses ``torch._C._current_graph_task_id``. Without it the answer is always False: a forward that
    activation checkpointing repeats is then observed twice, unless observations wait for a commit.
    While torch.compile traces, the answer is False: it traces such a forward once.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    task = getattr(torch._C, "_current_graph_task_id", None)  # pyright: ignore
    return task is not None and task() != -1


def all_modules_are_hooked() -> bool:
    """Whether hooks see the calls of every module now, as those of torch's FLOP counter do.

    Uses ``torch.nn.modules.module._has_any_global_hook``. Without it the answer is always False:
    Lightning's model summary then fails on attention with an example input, because the FLOP
    counter asks views of parameters for a gradient that they cannot have.
    """
    hooked = getattr(torch.nn.modules.module, "_has_any_global_hook", None)
    return hooked is not None and bool(hooked())


def without_function_modes() -> AbstractContextManager[object]:
    """Run torch functions without any ``TorchFunctionMode``.

    Uses ``torch._C.DisableTorchFunction``.

    Raises:
        RuntimeError: torch lacks it. Nothing can be quantized then, because a quantizer's own
            arithmetic would be quantized again.
    """
    disable = getattr(torch._C, "DisableTorchFunction", None)
    if disable is None:
        raise RuntimeError(
            f"lightning-qat needs torch._C.DisableTorchFunction, which torch {torch.__version__} "
            "does not have. Install the torch version that the documentation names."
        )
    context: AbstractContextManager[object] = disable()
    return context


def function_namespaces() -> tuple[Any, ...]:
    """Where the functions live that torch hands to a ``TorchFunctionMode``.

    One of them is ``torch._C._nn``, which holds the functions that ``torch.nn.functional``
    re-exports (``avg_pool2d``, ``gelu``). Without it these are still found there.
    """
    private = getattr(torch._C, "_nn", None)
    return (torch, Tensor, F) if private is None else (torch, Tensor, F, private)


def forget_guards(program: ExportedProgram, paths: Iterable[str]) -> None:
    """Make a program that no longer has some of its inputs forget what it demanded of their sizes.

    Uses ``ExportedProgram._guards_code``. Without it a converted model whose unneeded inputs were
    left out cannot be run where torch checks their sizes: ``'NoneType' object has no attribute
    'size'``.

    Args:
        program: Changed in place.
        paths: The inputs as guards name them: ``L['labels']``.
    """
    code = getattr(program, "_guards_code", None)
    if code is not None:
        gone = tuple(paths)
        program._guards_code = [c for c in code if not any(path in c for path in gone)]


def archive_records(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """The records of an archive as torch's own reader sees them: name to offset and size in bytes.

    Uses ``torch._C.PyTorchFileReader``, which ``torch.load`` and ``torch.export.load`` read with.
    Without it an ``AttributeError`` says so: no file is loaded that was not looked at.

    Raises:
        RuntimeError: torch cannot read it.
    """
    reader: Any = torch._C.PyTorchFileReader(file)
    return {
        name: (reader.get_record_offset(name), reader.get_record_size(name))
        for name in reader.get_all_records()
    }


def classes_said_to_be_safe() -> frozenset[str]:
    """Dotted names of what the program has given to ``torch.serialization.add_safe_globals``.

    Uses ``torch._weights_only_unpickler._get_user_allowed_globals``. Without it there are none:
    a checkpoint with such a class is refused unless it is trusted.
    """
    from torch import _weights_only_unpickler

    named = getattr(_weights_only_unpickler, "_get_user_allowed_globals", dict)
    return frozenset(named())


def operator_arguments(name: str, overload: str) -> list[tuple[str, str]] | None:
    """Names and types of an operator's arguments; ``None``: the dispatcher knows no such operator.

    Uses ``torch._C._dispatch_has_kernel``, which leaves out what TorchScript alone can call (one
    such operator writes files), and ``torch._C._get_schema``. Without them an ``AttributeError``
    says so: no converted model is loaded that was not looked at.

    Args:
        name: Such as ``aten::add``.
        overload: Such as ``Tensor``; ``default`` for the one without a name.
    """
    overload = "" if overload == "default" else overload
    full = f"{name}.{overload}" if overload else name
    if not torch._C._dispatch_has_kernel(full):
        return None
    schema = torch._C._get_schema(name, overload)
    return [(argument.name, str(argument.type)) for argument in schema.arguments]


def load_program(file: BinaryIO, beside: str) -> tuple[ExportedProgram, str]:
    """Load an exported program, and the text of an extra file beside it, from an open file.

    ``torch.export.load`` logs an error with its traceback, and raises one that says to look there.
    The first is raised here, and nothing is logged. Uses the logger ``torch.export``; without it
    the second error is raised.

    Raises:
        Exception: Of many kinds, where the file is not what ``torch.export.save`` wrote.
    """
    logged: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            logged.append(record.exc_info[1])
        return False

    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export.serde")]
    extra = {beside: ""}
    for logger in loggers:
        logger.addFilter(keep)
    try:
        return torch.export.load(file, extra_files=extra), extra[beside]
    except RuntimeError as error:
        raise (logged[0] if logged else error) from None
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
