"""What one signal of the whole sequence is read from: a place in a layer, and what is kept of what is there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm_squeeze import ops
from mllm_squeeze.engine.plan import PlannedCut
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.tokens.table import SpanTable
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.reducers.base import Among
from mllm_squeeze.reducers.needs import Attention, Need, Projection, Rotary, States


@dataclass(frozen=True)
class Spot:
    """Where a running model is read.

    side: "call" the attention function that a module calls, "input" what a module gets, "output" what it gives.
    """

    module: nn.Module
    side: Literal["call", "input", "output"]


@dataclass(frozen=True)
class Reading:
    """What was read in a pass, of all tokens that were there then.

    values: (B, M, ...). index: int64 (B, M), the prompt's columns that these tokens are, None where all were there.
    present: bool (B, M), which of them are no padding, None where none is.
    by_span: values are (S, M, ...), read for each span by itself. row_origin: int64 (S, N), which tokens of its span
    the last axis of `values` stands for, None where that is no axis of visual tokens.
    """

    values: Tensor
    index: Tensor | None = None
    present: Tensor | None = None
    by_span: bool = False
    row_origin: Tensor | None = None

    def at(self, prefill: Prefill, found: Found, place: Tensor) -> Tensor:
        """Return (S, N, ...) of the tokens that stand at `place` (S, N) now, whatever was cut since."""
        place = self._then(prefill, found.table.sample, place).to(self.values.device)
        rows = ops.on_device(found.rows, place) if self.by_span else found.table.sample.to(place.device)
        return self.values[rows[:, None], place]

    def whole(self, found: Found) -> Tensor:
        """Return (S, M, ...), of all tokens that were there when this was read."""
        return self.values[found.table.sample.to(self.values.device)]

    def among(self, prefill: Prefill, found: Found) -> Among:
        """Return where the visual tokens stood among all."""
        sample = found.table.sample
        width = self.values.shape[1]
        there = None if self.present is None else self.present[sample]
        if there is None:
            there = torch.ones(len(sample), width, dtype=torch.bool, device=sample.device)
        return Among(there, self._then(prefill, sample, found.place))

    def _then(self, prefill: Prefill, sample: Tensor, place: Tensor) -> Tensor:
        """Return where the tokens that stand at `place` now stood when this was read."""
        if prefill.index is self.index:
            return place
        assert prefill.index is not None
        column = prefill.index.to(place.device)[sample[:, None], place]
        if self.index is None:
            return column
        before = inverse(self.index, prefill.width).to(place.device)
        return before[sample[:, None], column]


def inverse(index: Tensor, width: int) -> Tensor:
    """Return int64 (B, width): where each number stands in a row of `index` (B, M), 0 where it is not there."""
    there = torch.zeros(index.shape[0], width, dtype=torch.long, device=index.device)
    return there.scatter(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))


@dataclass(frozen=True)
class Found:
    """The visual tokens that a signal is wanted of.

    table: their spans. place, origin: int64 (S, N), where they stand now and stood in their spans. size: float32
    (S, N), tokens that each stands for. mask: bool (S, N). rows: numbers of the spans.
    """

    table: SpanTable
    place: Tensor
    origin: Tensor
    size: Tensor
    mask: Tensor
    rows: list[int]

    def of(self, side: str, prefill: Prefill) -> Tensor:
        """Return the places of the visual tokens (S, N), or of the words (S, T)."""
        return prefill.text_place[self.table.sample] if side == "text" else self.place


@dataclass(frozen=True)
class Source(ABC):
    """Where one signal comes from, and in what form a rule gets it.

    need: the signal, of all tokens. layer: number of the layer that is read. ahead: it is behind the cut, so that it
    has to be computed when the cut asks.
    """

    need: Need
    layer: int
    ahead: bool = False

    @abstractmethod
    def spot(self, parts: ModelParts) -> Spot | None:
        """Return where the model is read as it runs, None where the engine hands it over by itself."""

    @abstractmethod
    def take(self, prefill: Prefill, given: Any) -> Reading | None:
        """Return what to keep of what is there; None where the pass has no use for it."""

    def shaped(self, need: Need) -> Source:
        """Return the same source for a need that wants it in a form of its own."""
        return replace(self, need=need)

    def answer(self, prefill: Prefill, reading: Reading, found: Found, side: str) -> Tensor:
        """Return the signal (S, N, ...) of the wanted visual tokens, (S, T, ...) of the words, (S, M, ...) of all."""
        if side == "all":
            return reading.whole(found)
        return reading.at(prefill, found, found.of(side, prefill))


def layer_of(planned: PlannedCut, need: Attention | Projection | Rotary | States) -> int:
    """Return the number of the layer that a need with a block speaks of."""
    if need.block == "next":
        return planned.layer
    block = int(need.block)
    return planned.layer + block if block < 0 else block
