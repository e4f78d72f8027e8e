"""Select, then merge: the end of a pipeline, the same for a whole span and for a half of a video."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mllm_squeeze import ops
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.parts.base import ABudget, AMerge, AScore, ASegment, ASelect, Groups, Merge, Part, Select, Written
from mllm_squeeze.parts.budget.even import Even
from mllm_squeeze.parts.select.top_k import TopK
from mllm_squeeze.reducers.base import Reduction, VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


def reduced(
    tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor, select: Select, merge: Merge | None
) -> Reduction:
    """Return what a selection and a merge make of the groups.

    limit: int64 (S, groups.count), what each group may keep.
    """
    if merge is not None and merge.picks:
        return merge.pick_and_merge(tokens, groups, score, limit)
    if merge is not None and merge.spare:
        # What is left over finds no place in a group that keeps nothing.
        closed = (limit <= 0).gather(1, groups.label.clamp(min=0))
        groups = Groups(groups.label.masked_fill(closed, -1), groups.count, groups.part, groups.widest)
        limit = (limit - merge.spare).clamp(min=0)
    picks = select.select(tokens, groups, score, limit)
    return Reduction(picks.keep) if merge is None else merge.merge(tokens, groups, picks, score)


class Half(Written):
    """What happens to one of the parts that a segment tells apart, such as what stands still in a video.

    score: a number per token; that of the step by default.
    segment: groups of its own inside the part; those of the step by default.
    budget: how what the step's budget gives the part is shared over its groups; given with a segment, or alone.
    select, merge: as in a step.
    """

    score: AScore | None = None
    segment: ASegment | None = None
    budget: ABudget | None = None
    select: ASelect = TopK()
    merge: AMerge | None = None

    def parts(self) -> Iterator[Part]:
        """Yield all its parts."""
        for part in (self.score, self.segment, self.budget, self.select, self.merge):
            if part is not None:
                yield from part.every()

    def reduce(
        self, tokens: VisualTokens, groups: Groups, inside: Tensor, score: Tensor | None, limit: Tensor
    ) -> Reduction:
        """Return what becomes of the tokens of the part; all others are dropped.

        groups: of the step. inside: bool (S, N), the tokens of the part. limit: int64 (S, groups.count).
        """
        own = Groups(groups.label.masked_fill(~inside, -1), groups.count, widest=groups.widest)
        total = limit.masked_fill(ops.segment_count(own.label, own.count) == 0, 0).sum(1)
        if self.segment is not None:
            found = self.segment.segment(tokens)
            own = Groups(found.label.masked_fill(~inside, -1), found.count, widest=found.widest)
        score = score if self.score is None else self.score.score(tokens, own)
        if self.segment is not None or self.budget is not None:
            limit = (self.budget or Even()).allot(replace(tokens, budget=total), own, score)
        return reduced(tokens, own, score, limit, self.select, self.merge)


def joined(reductions: Sequence[tuple[Tensor, Reduction]]) -> Reduction:
    """Return one reduction of several, each for the tokens bool (S, N) beside it; they do not overlap.

    Raises:
        ConfigError: one of them mixes a token into several survivors.
    """
    keep = functools.reduce(operator.or_, [one.keep & inside for inside, one in reductions])
    if all(one.assign is None and one.mix is None for _, one in reductions):
        return Reduction(keep)
    if any(one.mix is not None for _, one in reductions):
        raise ConfigError("a merge inside parts gives each token to one survivor; this one mixes it into several.")
    itself = ops.positions(keep).expand_as(keep)
    assign = itself.masked_fill(~keep, -1)
    for inside, one in reductions:
        if one.assign is not None:
            assign = one.assign.where(inside, assign)
    weights = ops.mean_weights(assign)
    for inside, one in reductions:
        if one.weights is not None:
            weights = one.weights.where(inside, weights)
    return Reduction(keep, assign, weights)
