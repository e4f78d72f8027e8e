"""More of the budget for groups whose tokens score more."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Budget, Groups, Part
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Proportional(Budget):
    """Share the budget over the groups in proportion to the mean of a score, by largest remainder, to the token.

    A group keeps no more than all its tokens; what is over is dealt one by one to the others, those of largest mean
    first, round after round. A group may keep nothing. Scores below 0 count as 0. arXiv 2512.06866.

    score: what groups are judged by; the score of the pipeline by default.
    most: tokens of a group at most, as long as there is room in others; None for all of it.
    """

    main: ClassVar[str | None] = "score"

    score: AScore | None = None
    most: int | None = Field(default=None, ge=1)

    def inside(self) -> tuple[Part, ...]:
        """Return the score."""
        return () if self.score is None else (self.score,)

    @property
    def scored(self) -> bool:
        """True unless it has a score of its own."""
        return self.score is None

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        own = score if self.score is None else self.score.score(tokens, groups)
        assert own is not None
        size = ops.segment_count(groups.label, groups.count).long()
        # Separators are no part of a group's mean.
        pieces = groups.label.masked_fill(own == -float("inf"), -1)
        mean = ops.segment_mean(own.nan_to_num(0, neginf=0).clamp(min=0), pieces, groups.count)
        mean = mean.masked_fill(size == 0, 0)
        limit = size if self.most is None else size.clamp(max=self.most)
        allotted = ops.dealt_out(tokens.budget, mean, limit)
        left = tokens.budget - allotted.sum(1)
        return allotted + ops.dealt_out(left, mean * 0, size - allotted)
