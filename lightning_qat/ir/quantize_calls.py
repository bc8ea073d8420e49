"""The calls of ``fake_quantize`` in a converted model, and the values that pass through them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch.export import ExportedProgram

from lightning_qat.ir.ops import FAKE_QUANTIZE, as_fake_quantize


class QuantizeCall(NamedTuple):
    """One quantization of an activation.

    Args:
        name: The tensor's key, with ``@1`` for the second call of its quantizer, as
            ``torch.export`` names the second call of a module.
        key: The tensor's key.
        node: Its node in the program's graph.
    """

    name: str
    key: str
    node: fx.Node


def quantize_calls(program: ExportedProgram) -> tuple[QuantizeCall, ...]:
    """Every quantization of an activation, in the order of the graph."""
    found: list[QuantizeCall] = []
    calls: Counter[str] = Counter()
    for node in program.graph.nodes:
        call = as_fake_quantize(node)
        if call is not None:
            found.append(QuantizeCall(call_name(call.key, calls[call.key]), call.key, node))
            calls[call.key] += 1
    return tuple(found)


def call_name(key: str, earlier: int) -> str:
    """The name of a call after so many earlier ones of the same quantizer.

    Example:
        >>> call_name("conv.input", 0), call_name("conv.input", 1)
        ('conv.input', 'conv.input@1')
    """
    return f"{key}@{earlier}" if earlier else key


def run_watched(
    module: fx.GraphModule, leaves: Sequence[Any], watch: Callable[[Tensor, Tensor], None]
) -> Any:
    """Run a program's module and look at every quantization.

    Args:
        module: What ``ExportedProgram.module`` returns.
        leaves: Its inputs, flattened.
        watch: Called with a tensor before and after its quantization, in the order of the graph.

    Returns:
        The outputs as the graph lists them.
    """
    return _Watcher(module, watch).run(*leaves, enable_io_processing=False)


class _Watcher(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watch: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__(module)
        self._watch = watch

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is FAKE_QUANTIZE:
            self._watch(args[0], result)
        return result
