"""Change what one object's method does the next time it is called, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class PatchOnce:
    """Runs a function before or after the next call of a method of one object.

    For the places where Lightning calls the module but no callback. The method is replaced on the
    object itself, so that ``is_overridden`` sees it, and what stood there is put back.

    Args:
        owner: The object.
        name: The method.
        before: Called with the method's arguments before it.
        after: Called with them after it.
    """

    def __init__(
        self,
        owner: object,
        name: str,
        *,
        before: Callable[..., None] | None = None,
        after: Callable[..., None] | None = None,
    ) -> None:
        self._attributes, self._name = vars(owner), name
        self._own: Any = self._attributes.get(name)
        original: Callable[..., Any] = getattr(owner, name)

        def once(*args: Any, **named: Any) -> Any:
            self.undo()
            if before is not None:
                before(*args, **named)
            result = original(*args, **named)
            if after is not None:
                after(*args, **named)
            return result

        self._once: Any = once
        self._attributes[name] = once

    def undo(self) -> None:
        """Put back what stood there, unless that has happened or somebody else has replaced it."""
        if self._attributes.get(self._name) is not self._once:
            return
        if self._own is None:
            del self._attributes[self._name]
        else:
            self._attributes[self._name] = self._own
