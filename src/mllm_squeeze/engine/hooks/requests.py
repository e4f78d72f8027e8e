"""What the calls of this thread, or of this task of an event loop, were asked for; others do not notice it."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar

from mllm_squeeze.engine.hooks.untraced import untraced
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.errors import UnsupportedInputError

# Requests whose blocks this thread, or this task, is in, the innermost last.
_OPEN: ContextVar[tuple[Request, ...]] = ContextVar("mllm_squeeze_requests", default=())


class Request:
    """What holds inside of one block.

    owner: the handle's requests. plan: what runs, None for the dense model. as_around: it asks for nothing of its own.
    """

    def __init__(self, owner: Requests, plan: Plan | None, as_around: bool) -> None:
        self.owner, self.plan, self.as_around = owner, plan, as_around

    def enter(self) -> None:
        """Begin the block."""
        _OPEN.set((*_OPEN.get(), self))

    def leave(self) -> None:
        """End the block, in whatever order blocks end."""
        left = list(_OPEN.get())
        # A generator may be closed where its block was never entered.
        if self in left:
            left.reverse()
            left.remove(self)
            _OPEN.set(tuple(reversed(left)))


class Requests:
    """The requests of one handle; `plan` is what runs outside of any block."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @untraced
    def is_on(self) -> bool:
        """True where the handle acts."""
        now = self._innermost()
        return now is None or now.plan is not None

    @untraced
    def planned(self) -> Plan:
        """Return the plan that runs now, that of the handle where it is switched off.

        Raises:
            UnsupportedInputError: it was asked for before the handle's method was switched.
        """
        now = self._innermost()
        if now is None or now.plan is None:
            return self.plan
        if not now.plan.is_of(self.plan):
            raise UnsupportedInputError(
                "The method was switched inside of this block of handle.using(), whose budget was asked of the method "
                "before. Leave the block, and ask the new method with handle.using()."
            )
        return now.plan

    def all_open(self) -> Iterator[Request]:
        """Return the requests of this handle whose blocks this thread, or this task, is in."""
        return (request for request in _OPEN.get() if request.owner is self)

    def _innermost(self) -> Request | None:
        for request in reversed(_OPEN.get()):
            if request.owner is self and not request.as_around:
                return request
        return None
