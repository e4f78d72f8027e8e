"""All that the cuts of a plan read while the text model runs, and where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze.engine.plan import Plan, PlannedCut, is_shared
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals.attention import AttentionSource
from mllm_squeeze.engine.signals.embedding import EmbeddingSource
from mllm_squeeze.engine.signals.projection import ProjectionSource
from mllm_squeeze.engine.signals.prompt_vector import PromptVectorSource
from mllm_squeeze.engine.signals.rotary import RotarySource
from mllm_squeeze.engine.signals.rows import AttentionCall
from mllm_squeeze.engine.signals.source import Source, Spot, layer_of
from mllm_squeeze.engine.signals.states import StatesSource
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.reducers.needs import Attention, Embedding, Need, Projection, Rotary, States


def source_of(planned: PlannedCut, need: Need) -> Source | None:
    """Return where a cut reads a signal, None for what is there when it cuts."""
    if isinstance(need, Attention):
        step = planned.step if need.rows == "chosen" else -1
        alike = replace(need, columns="visual", block=-1)
        return AttentionSource(alike, layer_of(planned, need), need.block == "next", step)
    if isinstance(need, Projection):
        alike_states = replace(need, of="visual", block=-1, heads="each")
        return ProjectionSource(alike_states, layer_of(planned, need), need.block == "next")
    if isinstance(need, Rotary):
        return RotarySource(replace(need, of="visual", block=-1), layer_of(planned, need))
    if isinstance(need, States):
        return StatesSource(replace(need, of="visual", block=-1), layer_of(planned, need))
    return _embedding(planned, need) if isinstance(need, Embedding) else None


def _embedding(planned: PlannedCut, need: Embedding) -> Source | None:
    """Return where words, or pictures, come from; pictures in the space of a text encoder are carried to the LLM."""
    if planned.text_encoder is None or not is_shared(need):
        return EmbeddingSource(Embedding(), 0)
    if need.of == "visual":
        return None
    return PromptVectorSource(Embedding(space="clip", raw=need.raw), 0, encoder=planned.text_encoder)


def chooses_rows(cut: PlannedCut) -> bool:
    """True where a rule itself says which words are read."""
    return any(isinstance(need, Attention) and need.rows == "chosen" for need in cut.reducer.needs())


def needs_of(cut: PlannedCut) -> tuple[Need, ...]:
    """Return what a cut reads, what its rule reads to choose rows included."""
    return (*cut.reducer.needs(), *(cut.reducer.row_needs() if chooses_rows(cut) else ()))


class Sources:
    """The sources of a plan, by where they are read.

    spots: what is read at each place of the model. last: for each source, the last layer in front of which it is used.
    """

    def __init__(self, plan: Plan, parts: ModelParts) -> None:
        self.plan = plan
        self.last: dict[Source, int] = {}
        self.previewed: set[int] = set()
        for cut in plan.cuts:
            for need in needs_of(cut):
                source = source_of(cut, need)
                if source is None:
                    continue
                if source.ahead:
                    self.previewed.add(source.layer)
                else:
                    self.last[source] = max(cut.layer, self.last.get(source, 0))
        self.spots: dict[Spot, list[Source]] = {}
        for source in self.last:
            spot = source.spot(parts)
            if spot is not None:
                self.spots.setdefault(spot, []).append(source)

    @property
    def first_layer(self) -> int | None:
        """Number of the first layer that is read, None where none is."""
        return min((source.layer for source in self.last), default=None)

    def start(self, prefill: Prefill, hidden: Tensor) -> None:
        """Keep what layer 0 gets ahead of any cut; hidden: (B, T, D)."""
        for source in self._read_in(prefill, 0):
            if isinstance(source, (EmbeddingSource, PromptVectorSource)):
                self._keep(prefill, source, hidden)

    def enter(self, prefill: Prefill, number: int, hidden: Tensor, rope: Any) -> None:
        """Keep what a layer gets behind the cuts in front of it.

        hidden: (B, M, D). rope: rotary tables of those tokens, in any of the forms that layers get.
        """
        for source in self._read_in(prefill, number):
            if isinstance(source, RotarySource):
                self._keep(prefill, source, rope)
            if isinstance(source, StatesSource) and source.asked.where == "in":
                self._keep(prefill, source, hidden)

    def hear(self, prefill: Prefill, spot: Spot, given: Any) -> None:
        """Keep what is there at a place of the model."""
        # A self-check runs other cuts.
        for source in self.spots[spot] if prefill.plan.is_of(self.plan) else ():
            self._keep(prefill, source, given)

    def hear_attention(self, prefill: Prefill, spot: Spot, call: AttentionCall) -> None:
        """Keep what is read of a call of an attention function."""
        number = self.spots[spot][0].layer
        # A cache of fixed size hands out empty slots as well.
        self.hear(prefill, spot, call.filled(prefill.held[number] + prefill.lengths[number]))

    def forget(self, prefill: Prefill, number: int) -> None:
        """Let go of what no cut behind the ones in front of a layer reads."""
        for source in [source for source in prefill.signals.read if self.last.get(source, -1) <= number]:
            del prefill.signals.read[source]

    def _read_in(self, prefill: Prefill, number: int) -> list[Source]:
        if not prefill.plan.is_of(self.plan):
            return []
        return [source for source in self.last if source.layer == number]

    @marked("signal")
    def _keep(self, prefill: Prefill, source: Source, given: Any) -> None:
        with torch.no_grad():
            found = source.take(prefill, given)
        if found is not None:
            prefill.signals.read[source] = found
