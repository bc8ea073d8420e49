"""Run a checkpointed function again in backward as it ran in the forward.

``torch.utils.checkpoint`` calls a function a second time while backward runs. The modules around it
do not run then, so their hooks do not either, and the calls that it makes itself would stay float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.compiler import is_dynamo_compiling

from lightning_qat.function_hooks.forward_cache import ForwardCache
from lightning_qat.function_hooks.frame import Frame
from lightning_qat.function_hooks.mode import QuantizeCallsMode
from lightning_qat.function_hooks.quantizer_protocol import Observations
from lightning_qat.function_hooks.running import hide_from_hooks, running


def to_be_run_again(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is about to be checkpointed, in the form in which backward shall call it."""
    now = running()
    if is_dynamo_compiling() or now.forward_cache is None or not now.frames:
        return function
    frames = [frame.at_this_call() for frame in now.frames]
    forward_cache = now.forward_cache
    forward_cache.runs_again = True
    runs = Counter(forward_cache.runs)

    # Its name tells call_site where the user's code ends.
    def _run_checkpointed_again(*args: Any, **kwargs: Any) -> Any:
        with _inside(frames, runs, forward_cache.observations) as again:
            result = function(*args, **kwargs)
            with hide_from_hooks():
                result = again.relu_fusion.read_all(result)
                again.relu_fusion.note_readers()
            return result

    return _run_checkpointed_again


@contextmanager
def _inside(
    frames: list[Frame], runs: Counter[int], observations: Observations | None
) -> Iterator[ForwardCache]:
    """Continue forwards that have ended, with a cache of their own and the ranges of then."""
    now = running()
    before = now.frames, now.forward_cache
    forward_cache = ForwardCache(traced=False)
    forward_cache.runs = Counter(runs)
    # For what is checkpointed within; in backward nothing is observed.
    forward_cache.observations = observations
    # Backward may run it several times.
    now.frames, now.forward_cache = [frame.repeated() for frame in frames], forward_cache
    try:
        ranges = nullcontext() if observations is None else observations.as_in_forward()
        with ranges, QuantizeCallsMode():
            yield forward_cache
    finally:
        now.frames, now.forward_cache = before
        forward_cache.close()
