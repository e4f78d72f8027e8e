"""Clocks, taking turns, and what is made of the times: medians, quartiles and ratios of pairs."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mllm_squeeze.bench.contestants import Contestant
from mllm_squeeze.bench.memory import peak_bytes
from mllm_squeeze.engine.timing import PARTS, Clock, timed

CLOCKS = ("wall", "cpu")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers, and how many there were."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles (linear between the numbers); raises ValueError without any."""
    if not values:
        raise ValueError("no numbers to take a median of")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


def paired(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the spread of above / below over the rounds: what slows a whole round down falls out of its ratio."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def order(contestants: int, round_number: int) -> list[int]:
    """Return who comes when: in turn, every other round backwards, so that a drift favours nobody."""
    turn = list(range(contestants))
    return turn if round_number % 2 == 0 else turn[::-1]


def make_clock(device: torch.device, kind: str) -> Callable[[], float]:
    """Return a clock in seconds that waits for the device; "cpu" counts what this process used of the cores."""
    if device.type == "cuda":

        def wall() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return wall
    return time.process_time if kind == "cpu" else time.perf_counter


@dataclass
class Times:
    """What was measured of one contestant, one number per round.

    encoder, prefill: seconds. decode: seconds per token. parts: seconds of the rule's own work, by part. memory: peak
    bytes of a prefill, beyond weights and features; None before it was weighed.
    """

    encoder: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})
    memory: int | None = None

    @property
    def rule(self) -> list[float]:
        """Seconds of the rule's own work, all parts together."""
        return [sum(row) for row in zip(*self.parts.values(), strict=True)]


class Race:
    """Lets contestants take turns.

    clock: "wall", or "cpu" for the time this process spent on the cores. steps: tokens to decode; the first of them
    warms up and is not counted.
    """

    def __init__(self, contestants: Sequence[Contestant], device: torch.device, clock: str, steps: int) -> None:
        self.contestants, self.device, self.steps = list(contestants), device, steps
        self.clock = make_clock(device, clock)
        self.times = {one.name: Times() for one in contestants}

    @torch.inference_mode()
    def run(
        self,
        rounds: int,
        warmup: int = 1,
        progress: Callable[[str], None] = lambda text: None,
        after: Callable[[], None] = lambda: None,
    ) -> dict[str, Times]:
        """Run all rounds and return the times by name; rounds of warming up are not counted.

        progress: told who runs. after: called behind each counted round.
        """
        for number in range(-warmup, rounds):
            for i in order(len(self.contestants), number):
                one = self.contestants[i]
                progress(f"round {number + 1} of {rounds}: {one.name}" if number >= 0 else f"warming up: {one.name}")
                self._turn(one, self.times[one.name] if number >= 0 else Times())
            if number >= 0:
                after()
        return self.times

    def _turn(self, one: Contestant, times: Times) -> None:
        with one.active(), timed(self._now) as clock:
            times.encoder.append(self._measure(one.encode)[1])
            state, seconds = self._measure(one.prefill)
            times.prefill.append(seconds)
            spans = list(clock.spans)
            seconds = 0.0
            for number in range(self.steps):
                state, taken = self._measure(functools.partial(one.step, state, number))
                seconds += taken if number else 0.0
            times.decode.append(seconds / max(self.steps - 1, 1))
        for name, value in part_seconds(clock, spans).items():
            times.parts[name].append(value)

    @torch.inference_mode()
    def weigh(self, progress: Callable[[str], None] = lambda text: None) -> None:
        """Run one more prefill of everyone for its memory, with no clock running."""
        for one in self.contestants:
            progress(f"memory: {one.name}")
            with one.active():
                self.times[one.name].memory = peak_bytes(one.prefill, self.device)

    def _measure(self, work: Callable[[], Any]) -> tuple[Any, float]:
        begin = self.clock()
        result = work()
        return result, self.clock() - begin

    def _now(self) -> Any:
        # Inside a prefill nothing may wait for the device, so events are recorded there.
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def part_seconds(clock: Clock, spans: Sequence[tuple[str, Any, Any]] | None = None) -> dict[str, float]:
    """Return the seconds of each part of the rule's own work."""
    out = dict.fromkeys(PARTS, 0.0)
    for name, start, end in clock.spans if spans is None else spans:
        out[name] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
    return out
