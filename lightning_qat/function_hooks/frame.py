"""The data of hooked forwards: the plan of one module's calls, and one running forward.

``hooks.py`` creates both; ``mode.py`` and the discovery of joins read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import copy

from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from lightning_qat.function_hooks.call_site import is_users, line_of_call, traced_line_of_call
from lightning_qat.function_hooks.forward_cache import ForwardCache
from lightning_qat.function_hooks.quantizer_protocol import InputQuantizer
from lightning_qat.function_hooks.relu_fusion import ReluCallSite

OUTPUT = "output:"
"""Key prefix of a module's own outputs: ``output:<tensor index>``. The operand number is the n-th
run of the module in this forward."""


class CallPlan:
    """The quantizers of the calls that one module makes, and what is known of these calls.

    Args:
        path: Dotted path of the module, for messages.
        sites: Call key (``add@forward+3:0``) to operand number to quantizer. A call that stays
            float has no operands.

    Attributes:
        outputs: Index of an output tensor to run of the module to quantizer.
        compact: Backward keeps little of the calls instead of what is fast; see ``int_repr``.
        relu_sites: Key of each call of relu to what reads its result.
        warned: The user has been told that a call took another path.
    """

    def __init__(self, path: str, sites: Mapping[str, Mapping[int, InputQuantizer]]) -> None:
        self.path = path
        self.sites = {call: dict(operands) for call, operands in sites.items()}
        self.outputs = {
            int(call.removeprefix(OUTPUT)): operands
            for call, operands in self.sites.items()
            if call.startswith(OUTPUT)
        }
        self.compact = False
        self.relu_sites: dict[str, ReluCallSite] = {}
        self.warned = False

    @property
    def plans_calls(self) -> bool:
        """Whether calls are planned here, not only the module's outputs."""
        return len(self.sites) > len(self.outputs)


class Frame:
    """One running forward of a module, and the calls it has made so far.

    Args:
        module: The module.
        plan: The plan of its calls, if it has one.
        watched: Its own forward runs, not another function in its place.

    Attributes:
        run: How many runs of the module this forward of the model has had before.
        mode: The function mode that this frame has entered.
        forward_cache: The cache that this frame has opened.
        outer_forward_cache: The cache that was open before.
    """

    def __init__(
        self, module: nn.Module, plan: CallPlan | None = None, *, watched: bool = True
    ) -> None:
        self.plan = plan
        self.watched = watched
        self.run = 0
        self.mode: TorchFunctionMode | None = None
        self.forward_cache: ForwardCache | None = None
        self.outer_forward_cache: ForwardCache | None = None
        self._calls: Counter[str] = Counter()
        # Code of torch's own modules and of ours is the same for everybody, and who calls them is
        # not theirs.
        self._is_users = is_users({"__name__": type(module).__module__})

    def repeated(self) -> Frame:
        """The same forward at the same call, to go on from there a second time."""
        frame = copy(self)
        frame.mode = frame.forward_cache = frame.outer_forward_cache = None
        frame._calls = Counter(self._calls)
        return frame

    @property
    def saves_compactly(self) -> bool:
        """Whether backward shall keep little of what is called now."""
        return self.plan is not None and self.plan.compact and not is_dynamo_compiling()

    def call_key(self, name: str) -> str:
        """The key of the next call of a function: ``add@forward+3:0``.

        Empty when a graph that torch.compile made runs: what it calls was seen when it was made.

        Args:
            name: Name of the operator; see ``lightning_qat.ir.operators``.
        """
        line = traced_line_of_call() if is_dynamo_compiling() else line_of_call()
        if line is None:
            return ""
        line = line if self._is_users else ""
        return f"{name}{line}:{self._calls[name + line]}"

    def count_call(self, key: str) -> None:
        """Note that the call with this key is made."""
        self._calls[key.rpartition(":")[0]] += 1
