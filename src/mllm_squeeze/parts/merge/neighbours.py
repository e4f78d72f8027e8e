"""Survivors that take up the tokens most like them, and one token of all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Merge, Picks
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import Mix, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class Neighbours(Merge):
    """Add to each survivor its nearest tokens of the group, weighted by the score; the sum of all others is one more.

    Survivors are neighbours too, a token may go into several, and weights are not normalised. The one token more stands
    at the place of the best of the others, and counts: the selection picks one token less than the budget. Where it is
    the only one left it stays as it is, and so does its group. PruMerge, arXiv 2403.15388.

    most: how many neighbours, of largest cosine.
    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    """

    spare: ClassVar[int] = 1
    main: ClassVar[str | None] = "most"

    most: int = Field(default=32, ge=1)
    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def merge(self, tokens: VisualTokens, groups: Groups, picks: Picks, score: Tensor | None) -> Reduction:
        """Return what goes into the survivors, and into the one token more of each group."""
        import torch

        there = groups.label >= 0
        weight = tokens.mask.float() if score is None else score.float()
        finite = weight.isfinite()
        others = there & ~picks.keep
        rank = ops.rank_within(weight, groups.label.clamp(min=0), others)
        place = others & (rank == 0)
        weight = torch.where(finite, weight, 0)
        # A group that is all kept stays as it is.
        left = ops.segment_count(groups.label.masked_fill(~others, -1), groups.count).gather(
            1, groups.label.clamp(min=0)
        )
        mixed = groups.label.masked_fill(~there | (left < 2), -1)
        slots = min(mixed.shape[1], max(tokens.counts))
        centres = picks.keep & (mixed >= 0)
        slots = slots if tokens.asked else max(1, int(centres.sum(1).max()))
        entries = [
            ops.neighbour_entries(tokens[need_of(self.by)], weight, centres, mixed, self.most, slots),
            ops.group_sum_entries(weight, others & (mixed >= 0), place, mixed, groups.count),
        ]
        joined = [torch.cat(parts) for parts in zip(*entries, strict=True)]
        return Reduction(picks.keep | place, mix=Mix(*joined))
