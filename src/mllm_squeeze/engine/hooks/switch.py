"""Whether a handle acts on the calls of this thread; other threads do not notice when it is switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mllm_squeeze.engine.hooks.untraced import untraced

# Switches that are off in this thread, or in this task of an event loop, once for each block around it.
_OFF: ContextVar[tuple[Switch, ...]] = ContextVar("mllm_squeeze_off", default=())


class Switch:
    """On, but inside the blocks of `off`."""

    @untraced
    def is_on(self) -> bool:
        """True where the handle acts."""
        return self not in _OFF.get()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch off inside the block, in this thread or task; blocks nest."""
        _OFF.set((*_OFF.get(), self))
        try:
            yield
        finally:
            left = list(_OFF.get())
            left.remove(self)
            _OFF.set(tuple(left))
