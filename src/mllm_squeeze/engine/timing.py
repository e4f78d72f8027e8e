"""Marks what the rule itself does, for clocks and profilers; a mark nobody looks at costs one comparison."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import profiler

P = ParamSpec("P")
R = TypeVar("R")

PARTS = ("signal", "select", "merge", "shorten")


def now(device: torch.device) -> Any:
    """Return a point in time: seconds on a CPU, a recorded event on a GPU, so that nothing waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Clock:
    """Collects when each marked part began and ended; parts inside other parts count as those.

    now: returns a point in time.
    """

    def __init__(self, now: Callable[[], Any]) -> None:
        self.now = now
        self.spans: list[tuple[str, Any, Any]] = []
        self._inside = False

    def run(self, name: str, function: Callable[[], R]) -> R:
        """Run a function as one part."""
        if self._inside:
            return function()
        self._inside = True
        start = self.now()
        try:
            return function()
        finally:
            self.spans.append((name, start, self.now()))
            self._inside = False


_clock: Clock | None = None


@contextmanager
def timed(now: Callable[[], Any]) -> Iterator[Clock]:
    """Collect the marked parts that run inside the block, in any thread; blocks do not nest."""
    global _clock
    _clock = Clock(now)
    try:
        yield _clock
    finally:
        _clock = None


def marked(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function as one part of the rule's own work; profilers show it as `squeeze::<name>`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            clock = _clock
            if clock is not None:
                return clock.run(name, lambda: function(*args, **kwargs))
            if profiler._is_profiler_enabled:
                with profiler.record_function(f"squeeze::{name}"):
                    return function(*args, **kwargs)
            return function(*args, **kwargs)

        return run

    return decorate
