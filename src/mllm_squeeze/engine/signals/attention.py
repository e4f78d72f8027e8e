"""Attention that tokens receive in a layer, from the rows that a rule asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mllm_squeeze import ops
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.signals.rows import AttentionCall, score_joined
from mllm_squeeze.engine.signals.source import Found, Reading, Source, Spot, inverse
from mllm_squeeze.family.structure import ModelParts, find_attention, is_causal
from mllm_squeeze.reducers.needs import Attention


@dataclass(frozen=True)
class AttentionSource(Source):
    """Reads queries and keys where a layer computes its attention.

    step: number of the step whose rule chose the rows; -1 where no rule chooses.
    """

    step: int = -1

    def spot(self, parts: ModelParts) -> Spot | None:
        """The attention function of the layer."""
        attention = find_attention(parts.layers[self.layer])
        return None if attention is None else Spot(attention, "call")

    @property
    def asked(self) -> Attention:
        """The need."""
        assert isinstance(self.need, Attention)
        return self.need

    def take(self, prefill: Prefill, given: Any) -> Reading | None:
        """Return the scores of all tokens; rows that were never chosen are those of a cut that has nothing to do."""
        call: AttentionCall = given
        need, causal = self.asked, is_causal(call.module)
        new = call.key.shape[2] - call.query.shape[2]
        if need.rows == "visual":
            return self._by_span(prefill, call, causal, new)
        if need.rows == "chosen" and self.step not in prefill.signals.row_weights:
            return None
        rows, there = self._rows(prefill, call)
        scores = score_joined(call, rows, there, causal, need.heads, need.over_rows, need.rows == "all")
        return Reading(scores[..., new:].movedim(-1, 1), prefill.index)

    def _rows(self, prefill: Prefill, call: AttentionCall) -> tuple[Tensor | None, Tensor]:
        """Return the rows (B, R) that are read, None for all of them, and bool (B, R): which of them count."""
        device = call.query.device
        if self.asked.rows == "all":
            there = prefill.present
            if there is None:
                there = torch.ones(call.query.shape[0], call.query.shape[2], dtype=torch.bool, device=device)
            return None, there.to(device)
        if self.asked.rows == "last":
            return prefill.last_place.to(device), torch.ones_like(prefill.last_place, dtype=torch.bool, device=device)
        chosen = prefill.signals.row_weights[self.step] > 0 if self.asked.rows == "chosen" else prefill.text_mask
        return prefill.text_place.to(device), chosen.to(device)

    def _by_span(self, prefill: Prefill, call: AttentionCall, causal: bool, new: int) -> Reading:
        """Read the rows of each span by itself, so that the keys of a prompt are not repeated for its spans."""
        assert prefill.layout is not None
        need, table = self.asked, prefill.table
        found: list[Tensor] = []
        for row, (span, count) in enumerate(zip(prefill.layout.spans, table.current, strict=True)):
            # A span of which nothing is left has one row, which does not count.
            places = table.place[row : row + 1, : max(count, 1)].to(call.query.device)
            there = torch.full_like(places, count > 0, dtype=torch.bool)
            one = call.of_sample(span.sample)
            scores = score_joined(one, places, there, causal, need.heads, need.over_rows)[0, ..., new:]
            if need.over_rows == "each":
                scores = functional.pad(scores, (0, 0, 0, max(table.place.shape[1], 1) - places.shape[1]))
            found.append(scores.movedim(-1, 0))
        origin = table.origin if need.over_rows == "each" else None
        return Reading(torch.stack(found), prefill.index, by_span=True, row_origin=origin)

    def answer(self, prefill: Prefill, reading: Reading, found: Found, side: str) -> Tensor:
        """Return the scores with their tokens last: (S, N), (S, H, N), (S, R, N) or (S, H, R, N)."""
        scores = super().answer(prefill, reading, found, self.asked.columns)
        if reading.row_origin is not None:
            spans = ops.on_device(found.rows, reading.row_origin)
            scores = _take_rows(scores, reading.row_origin[spans], found)
        return scores.movedim(1, -1)


def _take_rows(scores: Tensor, then: Tensor, found: Found) -> Tensor:
    """Take the rows of the wanted tokens from the last axis of (S, N, ..., R), 0 where there is no token.

    then: int64 (S, R), the tokens of the span that stood there.
    """
    width = int(max(then.max(), found.origin.max())) + 1
    slot = inverse(then, width).gather(1, found.origin).to(scores.device)
    shape = (slot.shape[0], *(1,) * (scores.ndim - 2), slot.shape[1])
    picked = scores.gather(-1, slot.view(shape).expand(*scores.shape[:-1], -1))
    return picked * found.mask.view(shape).to(picked)
