"""The data of hooked forwards: the plan of one module's calls, and one running forward.

``hooks.py`` creates both; ``mode.py`` and the discovery of joins read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import copy
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from lightning_qat.function_hooks.call_site import (
    RUNS_AGAIN,
    Within,
    call_line,
    call_site,
    is_by_line,
    is_users,
    running_call,
    traced_call_line,
    traced_call_site,
)
from lightning_qat.function_hooks.forward_cache import ForwardCache
from lightning_qat.function_hooks.quantizer_protocol import InputQuantizer
from lightning_qat.function_hooks.relu_fusion import ReluCallSite

OUTPUT = "output:"
"""Key prefix of a module's own outputs: ``output:<tensor index>``, and ``of <place>`` where the
user's code makes the tensor in that module. The operand number is the n-th run of the module in
this forward."""

_PLACE = " of "
_RUN = " from "


def output_key(index: int, place: str) -> str:
    """The key of an output: its index among the tensors, and what makes it.

    Example:
        >>> output_key(0, ""), output_key(1, "mul@forward[*#0]")
        ('output:0', 'output:1 of mul@forward[*#0]')
    """
    return f"{OUTPUT}{index}{_PLACE}{place}" if place else f"{OUTPUT}{index}"


def caller_of(key: str) -> str | None:
    """Path of the module that runs the module of a call, where runs are told apart by it.

    Example:
        >>> caller_of("silu:0 from neck.conv:1"), caller_of("add@forward[+#0]:0")
        ('neck.conv', None)
    """
    _, told_apart, run = key.partition(_RUN)
    return run.rpartition(":")[0] if told_apart else None


def without_caller(key: str) -> str:
    """The key of a call in a module that runs once.

    Example:
        >>> without_caller("silu:0 from neck.conv:1")
        'silu:0'
    """
    return key.partition(_RUN)[0]


class CallPlan:
    """The quantizers of the calls that one module makes, and what is known of these calls.

    Args:
        path: Dotted path of the module, for messages.
        sites: Call key (``add@forward[+#0]:0``) to operand number to quantizer. A call that stays
            float has no operands.

    Attributes:
        outputs: Index of an output tensor to the place that makes it (empty: any) to run of the
            module to quantizer.
        places: Every place that makes an output, and the name of the function there.
        multiplies: Names of the functions that have planned calls.
        compact: Backward keeps little of the calls instead of what is fast; see ``int_repr``.
        relu_sites: Key of each call of relu to what reads its result.
        warned: The user has been told that a call took another path.
    """

    def __init__(self, path: str, sites: Mapping[str, Mapping[int, InputQuantizer]]) -> None:
        self.path = path
        self.sites = {call: dict(operands) for call, operands in sites.items()}
        self.outputs: dict[int, dict[str, Mapping[int, InputQuantizer]]] = {}
        for call, operands in self.sites.items():
            if call.startswith(OUTPUT):
                index, _, place = call.removeprefix(OUTPUT).partition(_PLACE)
                self.outputs.setdefault(int(index), {})[place] = operands
        made = {place for places in self.outputs.values() for place in places if place}
        self.places: Mapping[str, str] = {place: place.partition("@")[0] for place in made}
        self.multiplies = frozenset(
            call.partition("@")[0].partition(":")[0] for call, found in self.sites.items() if found
        )
        self._by_line = any(map(is_by_line, self.sites))
        self._by_caller = any(caller_of(call) is not None for call in self.sites)
        self.compact = False
        self.relu_sites: dict[str, ReluCallSite] = {}
        self.warned = False

    @property
    def plans_calls(self) -> bool:
        """Whether calls are planned here, not only the module's outputs."""
        return any(not call.startswith(OUTPUT) for call in self.sites)

    @property
    def tells_callers_apart(self) -> bool:
        """Whether the calls of each run of the module have quantizers of their own."""
        return self._by_caller

    @property
    def is_by_line(self) -> bool:
        """Whether an earlier version made the plan, which named calls by their lines."""
        return self._by_line


class Frame:
    """One running forward of a module, and the calls it has made so far.

    Args:
        module: The module.
        plan: The plan of its calls, if it has one.
        watched: Its own forward runs, not another function in its place.
        caller: The forward that runs the module; ``None``: it is the outermost one.

    Attributes:
        training: The module is in training mode.
        is_root: The module is the model itself, of which every other path is a part.
        run: How many runs of the module this forward of the model has had before.
        made: Identity of a tensor to the place that made it, of those that ``CallPlan.places`` has.
        mode: The function mode that this frame has entered.
        forward_cache: The cache that this frame has opened.
        outer_forward_cache: The cache that was open before.
        handled: The exception that was being handled when the cache was opened.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: CallPlan | None = None,
        *,
        path: str = "",
        watched: bool = True,
        caller: Frame | None = None,
    ) -> None:
        self.plan = plan
        self.path = path
        self.watched = watched
        self.training = module.training
        self.is_root = plan is not None and not plan.path
        self.run = 0
        self.mode: TorchFunctionMode | None = None
        self.forward_cache: ForwardCache | None = None
        self.outer_forward_cache: ForwardCache | None = None
        self.handled: BaseException | None = None
        self.made: dict[int, str] = {}
        self._called_from = ""
        self._within: Within = None if is_dynamo_compiling() else running_call()
        self._calls: Counter[str] = Counter()
        self._runs_inside: Counter[str] = Counter()
        # Of a plan that tells them apart, and while one is made.
        self._run = ""
        if caller is not None and (plan is None or plan.tells_callers_apart):
            self._run = f"{_RUN}{caller.path}:{caller._runs_inside[path]}"
            caller._runs_inside[path] += 1
        # Code of torch's own modules and of ours is the same for everybody, and who calls them is
        # not theirs.
        self.is_users = is_users({"__name__": type(module).__module__})

    def at_this_call(self) -> Frame:
        """The same forward at the call that it makes now, to go on from there a second time."""
        frame = self.repeated()
        frame._called_from = self._site() or ""
        return frame

    def repeated(self) -> Frame:
        """The same forward where it stands."""
        frame = copy(self)
        frame.mode = frame.forward_cache = frame.outer_forward_cache = None
        frame._calls, frame._runs_inside = Counter(self._calls), Counter(self._runs_inside)
        frame.made = {}
        frame._within = RUNS_AGAIN
        return frame

    @property
    def saves_compactly(self) -> bool:
        """Whether backward shall keep little of what is called now."""
        return self.plan is not None and self.plan.compact and not is_dynamo_compiling()

    def call_key(self, name: str) -> str:
        """The key of the next call of a function: ``add@forward[+#0]:0``.

        Empty when a graph that torch.compile made runs: what it calls was seen when it was made.
        Empty, too, when a module inside this one makes the call and the plan knows no call of that:
        code of training alone takes no other code's quantizers.

        Args:
            name: Name of the operator; see ``lightning_qat.ir.operators``.
        """
        place = self.place(name)
        return f"{place}:{self._calls[place]}{self._run}" if place else ""

    def place(self, name: str) -> str:
        """The place of a call: ``add@forward[+#0]``; empty as ``call_key``."""
        site = self._site()
        if site is None:
            return ""
        return name + site if self.is_users else name

    def _site(self) -> str | None:
        by_line = self.plan is not None and self.plan.is_by_line
        if is_dynamo_compiling():
            return traced_call_line() if by_line else traced_call_site()
        if by_line:
            return call_line(self._within)
        site = call_site(self._within)
        # Backward runs a part of the forward again, without the part that called it.
        return self._called_from if site == "" else site

    def count_call(self, key: str) -> None:
        """Note that the call with this key is made."""
        self._calls[without_caller(key).rpartition(":")[0]] += 1

    def note_result(self, function: str, result: Any, source: Any = None) -> None:
        """Note a tensor that a place of ``CallPlan.places`` makes, or that another one changes.

        Args:
            function: Name of the function.
            result: What it returns.
            source: The tensor that it hands on; ``None``: it makes one of its own.
        """
        assert self.plan is not None
        place = self.place(function) if function in self.plan.places.values() else ""
        if place not in self.plan.places and source is not None:
            place = self.made.get(id(source), "")
        for leaf in result if isinstance(result, list | tuple) else (result,):
            if isinstance(leaf, Tensor):
                if place in self.plan.places:
                    self.made[id(leaf)] = place
                elif id(leaf) in self.made:
                    # Changed in place, or the number of a tensor that is gone.
                    del self.made[id(leaf)]
