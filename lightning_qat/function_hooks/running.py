"""The forwards that run in this thread: one object per thread, and what hides from the hooks.

``hooks.py`` and ``mode.py`` keep it; quantizers and layers ask it for the cache of the running
forward, and hide their own arithmetic.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch.compiler import is_dynamo_compiling

from lightning_qat.function_hooks.forward_cache import ForwardCache
from lightning_qat.function_hooks.frame import Frame
from lightning_qat.model.torch_private import without_function_modes


class Running:
    """What runs in one thread.

    Attributes:
        frames: The running forwards of hooked modules, outermost first.
        forward_cache: The cache of the innermost forward that keeps one.
        hidden: ``torch.compile`` traces arithmetic that is hidden from the hooks.
        evaluating: What runs is no training, whatever the modes; see ``evaluation``.
    """

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.forward_cache: ForwardCache | None = None
        self.hidden = False
        self.evaluating = False

    def open_cache(self, frame: Frame, forward_cache: ForwardCache) -> None:
        """Use a new cache until a frame is closed."""
        frame.outer_forward_cache, self.forward_cache = self.forward_cache, forward_cache
        frame.forward_cache = forward_cache

    def close(self, frame: Frame) -> None:
        """End what began with a frame."""
        if frame.mode is not None:
            frame.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if frame.forward_cache is not None:
            self.forward_cache = frame.outer_forward_cache
            frame.forward_cache.close()


class _Local(threading.local):
    def __init__(self) -> None:
        # torch.compile reads what a thread's local holds, but misses that it was set anew.
        self.running = Running()


_LOCAL = _Local()


def running() -> Running:
    """What runs in this thread."""
    return _LOCAL.running


def current_forward_cache() -> ForwardCache | None:
    """The cache of the forward that runs in this thread, if it keeps one.

    A cache holds tensors of its own forward, so a graph that ``torch.compile`` makes of a part of
    it keeps its own, or none.
    """
    cache = _LOCAL.running.forward_cache
    return cache if cache is None or cache.traced == is_dynamo_compiling() else None


@contextmanager
def evaluation() -> Iterator[None]:
    """Nothing that runs in the block is training: nothing is observed, whatever the modes."""
    now = running()
    before, now.evaluating = now.evaluating, True
    try:
        yield
    finally:
        now.evaluating = before


def hide_from_hooks() -> AbstractContextManager[object]:
    """Hide a quantizer's own arithmetic from the mode that quantizes the model's calls."""
    if is_dynamo_compiling():
        return _HiddenWhileTracing(_LOCAL.running)
    # Where a graph has broken, the cache that it has opened is of no use, but the mode runs on.
    return nullcontext() if _LOCAL.running.forward_cache is None else without_function_modes()


def hide_from_all_modes() -> AbstractContextManager[object]:
    """Hide a layer's arithmetic from every function mode, also from the one that makes the plan.

    Such arithmetic is no join of the model's.
    """
    if is_dynamo_compiling():
        return _HiddenWhileTracing(_LOCAL.running)
    return without_function_modes()


class _HiddenWhileTracing:
    """For ``torch.compile``, which ignores ``DisableTorchFunction``: the mode asks ``hidden``."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def __enter__(self) -> None:
        self._before, self._running.hidden = self._running.hidden, True

    def __exit__(self, *exception: object) -> None:
        self._running.hidden = self._before


def forget_running() -> None:
    """Forget forwards that ended without their hooks.

    torch runs no hook after a forward that raised while it was exported, or that was interrupted
    from the keyboard.
    """
    while _LOCAL.running.frames:
        _LOCAL.running.close(_LOCAL.running.frames.pop())
