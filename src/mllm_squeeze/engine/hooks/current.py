"""What runs in a thread now: calls of the inner model, with their inputs and what the encoders gave for them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Generic, TypeVar

from mllm_squeeze.engine.encoder.call import EncodeCall
from mllm_squeeze.engine.encoder.sound import SoundCall
from mllm_squeeze.engine.hooks.running import caller, is_running
from mllm_squeeze.engine.hooks.untraced import untraced
from mllm_squeeze.engine.sequence.passes import Pass
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.upstream.prompts import GenerateCall, PromptCall

T = TypeVar("T")


@dataclass
class PromptRun:
    """One call of the inner model, and the features that its encoders gave for it."""

    call: PromptCall
    features: dict[str, Features] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole:
    """One call of the whole model.

    wanted: trailing tokens that its logits are wanted of, None for all. encoded: what was recorded about the features
    that it brings, by modality; whatever rebuilds them on their way to the inner model loses that.
    """

    wanted: int | None
    encoded: Mapping[str, Features]


class Entry(Generic[T]):
    """What belongs to one call."""

    def __init__(self, value: T, frame: FrameType) -> None:
        self.value = value
        self._frame = frame

    def runs_in(self, frame: FrameType) -> bool:
        """True where this is the frame of the call."""
        return self._frame is frame

    @property
    def lives(self) -> bool:
        """True while the call runs in this thread."""
        return is_running(self._frame)


class Calls(Generic[T]):
    """What belongs to the calls of one module, or of one function of ours, that run now, the innermost last.

    torch runs no hook behind a call that ends with Ctrl-C, and Ctrl-C may come in front of any line of ours, so an
    entry counts as long as the frame of its call is on the stack.
    """

    def __init__(self) -> None:
        self._entries: list[Entry[T]] = []

    @untraced
    def enter(self, value: T, frame: FrameType | None = None) -> Entry[T]:
        """Add what belongs to a call: to the one that runs this hook, or to that of a frame."""
        self._drop_dead()
        self._entries.append(Entry(value, caller() if frame is None else frame))
        return self._entries[-1]

    @untraced
    def leave(self, entry: Entry[T] | None = None) -> T | None:
        """Take away an entry, or that of the call which runs this hook; None where there is none."""
        self._drop_dead()
        if not self._entries:
            return None
        last = self._entries[-1]
        mine = last.runs_in(caller()) if entry is None else last is entry
        return self._entries.pop().value if mine else None

    @property
    def top(self) -> T | None:
        """What belongs to the innermost call that runs, None where none does."""
        if not self._entries:
            return None
        # Layers ask in each decode step, which mostly needs nothing of us; whether its call runs makes no difference.
        if len(self._entries) == 1 and self._entries[0].value is None:
            return None
        return self._innermost()

    @untraced
    def _innermost(self) -> T | None:
        self._drop_dead()
        return self._entries[-1].value if self._entries else None

    def _drop_dead(self) -> None:
        while self._entries and not self._entries[-1].lives:
            self._entries.pop()


class Local(threading.local):
    """What runs in this thread now; threads that share a model do not meet."""

    def __init__(self) -> None:
        self.prompt_runs: Calls[PromptRun] = Calls()
        self.passes: Calls[Pass | None] = Calls()
        self.wholes: Calls[Whole] = Calls()
        self.encodings: Calls[EncodeCall] = Calls()
        # None while sound is encoded again, to find the way to the LLM's tokens.
        self.sounds: Calls[SoundCall | None] = Calls()
        # The prefill of a self-check that runs now: the text model is called inside its own pre-hook.
        self.probes: Calls[tuple[Prefill | None]] = Calls()
        self.prompts: Calls[GenerateCall] = Calls()

    @property
    def encode(self) -> EncodeCall | None:
        """The outermost call of a feature method."""
        return self.encodings.top

    @property
    def probe(self) -> tuple[Prefill | None] | None:
        """The prefill that a self-check runs the text model with, None outside of one."""
        return self.probes.top

    @property
    def prompt(self) -> int | None:
        """Length of the prompt that generate() was called with, None outside of it."""
        return None if self.prompts.top is None else self.prompts.top.prompt_length

    @property
    def rows(self) -> int | None:
        """Rows of the prompt that generate() was called with, None outside of it."""
        return None if self.prompts.top is None else self.prompts.top.rows

    @property
    def prompt_run(self) -> PromptRun | None:
        """The innermost call of the inner model."""
        return self.prompt_runs.top

    @property
    def wanted(self) -> int | None:
        """Trailing tokens that the innermost call of the whole model is about, None for all."""
        return None if self.wholes.top is None else self.wholes.top.wanted

    @property
    def running(self) -> Pass | None:
        """The innermost decoder pass, None where its layers need nothing of us."""
        return self.passes.top
