"""More of the budget for events that are looked at and bear on the question."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Budget, Groups, Part
from mllm_squeeze.parts.segment.events import best_frame
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class EventWeight(Budget):
    """Share the budget over the groups by the softmax of mean score plus relevance of the best frame, to the token.

    Shares are rounded by largest remainder; a group keeps one token at least, as long as there are so many, and no more
    than all its tokens. arXiv 2506.02850.

    relevance: a score whose mean over a frame is its relevance.
    score: whose mean over a group is added; the score of the pipeline by default.
    """

    main: ClassVar[str | None] = "relevance"

    relevance: AScore
    score: AScore | None = None

    def inside(self) -> tuple[Part, ...]:
        """Return the scores."""
        return (self.relevance,) if self.score is None else (self.relevance, self.score)

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
        mean = ops.segment_mean(own, pieces, groups.count) + best_frame(tokens, groups, self.relevance)
        share = mean.nan_to_num(neginf=-1e6).masked_fill(size == 0, -float("inf")).softmax(1).nan_to_num()
        return ops.one_each(ops.dealt_out(tokens.budget.minimum(size.sum(1)), share, size), size, share)
