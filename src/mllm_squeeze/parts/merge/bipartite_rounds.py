"""Pairs of like tokens merge round after round."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Merge
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need, Place

if TYPE_CHECKING:
    from torch import Tensor


class BipartiteRounds(Merge):
    """Merge tokens at even positions of a group into the most like one at an odd position, round after round.

    Each round merges half of what is left, or as many as a budget of the step asks for in the end; a token becomes the
    plain mean of what goes into it, in later rounds the mean of means. arXiv 2412.03248, by the matching of ToMe (arXiv
    2210.09461). A group keeps one token at least.

    rounds: how many, where the step asks for no budget; 0 merges nothing.
    by: the vectors that are compared, and merged from round to round, see `mllm_squeeze.parts.vectors`.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    known_count: ClassVar[bool] = False
    picks: ClassVar[bool] = True
    decides: ClassVar[bool] = True
    main: ClassVar[str | None] = "rounds"
    why_more: ClassVar[str | None] = "each group keeps at least one token"

    rounds: int = Field(default=2, ge=0)
    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def pick_and_merge(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Reduction:
        """Return who goes into whom."""
        width = groups.label.shape[1]
        slots = min(groups.widest or width, width)
        index, filled = ops.group_rows(groups.label, groups.count, slots)
        there = filled.reshape(-1, slots)
        x = ops.take(tokens[need_of(self.by)], index).flatten(2).reshape(len(there), slots, -1)
        keep = limit.reshape(-1).clamp(min=1) if tokens.asked else there.new_ones(len(there), dtype=limit.dtype)
        into, part = ops.bipartite_rounds(x, there, keep, self._rounds(tokens, slots))
        # From places in a group to places in the span.
        owner = index.reshape(-1, slots).gather(1, into.clamp(min=0)).reshape(index.shape)
        assign = ops.put_back(groups.label.new_full(groups.label.shape, -1), index, filled, owner)
        weights = ops.put_back(part.new_zeros(groups.label.shape), index, filled, part.reshape(index.shape))
        return Reduction((assign == ops.positions(assign)) & (groups.label >= 0), assign, weights)

    def _rounds(self, tokens: VisualTokens, slots: int) -> int:
        """Return how many rounds are enough for every group; in an odd one half is rounded, so one more."""
        if not tokens.asked:
            return self.rounds
        most = max(now / max(1, left) for now, left in zip(tokens.current, tokens.counts, strict=True))
        return min(math.ceil(math.log2(max(1.0, most))) + 1, slots.bit_length())
