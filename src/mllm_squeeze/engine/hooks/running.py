"""Which calls run now: on the stack of this thread, and on those of other threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from torch import nn

from mllm_squeeze.errors import InUseError

# Functions, each with the module as `self`, that are on the stack while a module is called or generates.
_CALLS = ("_wrapped_call_impl", "_call_impl", "generate")
# What stands between a hook and the call it belongs to, the second where torch.compile broke a graph.
_BETWEEN = ("mllm_squeeze.", "torch._dynamo")
_RESUMED = "torch_dynamo_resume_in_"


def caller() -> FrameType:
    """Return the frame of the call that runs a hook of ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _between(frame):
        frame = frame.f_back
    return frame


def _between(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__") or ""
    return name.startswith(_BETWEEN) or frame.f_code.co_name.startswith(_RESUMED)


def is_running(frame: FrameType) -> bool:
    """True while a frame is on the stack of this thread; a traceback may keep one that has ended."""
    found: FrameType | None = sys._getframe(1)
    while found is not None and found is not frame:
        found = found.f_back
    return found is not None


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def require_idle(modules: Iterable[nn.Module], own_too: bool = False) -> None:
    """Check that no other thread is inside a call of these modules: torch goes through their hooks without a lock.

    own_too: nor this thread.

    Raises:
        InUseError: one is.
    """
    wanted = {id(module) for module in modules}
    own = threading.get_ident()
    for thread, innermost in sys._current_frames().items():
        if (own_too or thread != own) and any(id(_caller_self(frame)) in wanted for frame in _stack(innermost)):
            who = "Another" if thread != own else "This"
            raise InUseError(
                f"{who} thread is inside a call of this model, so hooks can be neither put on nor taken off now. Wait "
                "until it is done. To run dense in this thread alone, use `with handle.using(off=True):`; to run with "
                "another budget, `with handle.using(ratio=...):`."
            )


def _caller_self(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get("self") if code.co_name in _CALLS and code.co_varnames[:1] == ("self",) else None
