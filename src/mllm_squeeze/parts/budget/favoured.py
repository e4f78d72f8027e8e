"""More of the budget for groups that bear on the question, the others by their length."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Budget, Groups, Part
from mllm_squeeze.parts.segment.events import best_frame
from mllm_squeeze.parts.segment.frame import frames_of
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Favoured(Budget):
    """Share the budget over the groups by how many frames they hold, so many times as much for relevant ones.

    Relevant is a share of the groups, those with the best frame. Shares are rounded by largest remainder; a group keeps
    no more than all its tokens, what is over goes round, and it may keep nothing. arXiv 2505.20100.

    relevance: a score whose mean over a frame is its relevance.
    share: of the groups, that are relevant, rounded up.
    times: how many times as much a frame of theirs counts.
    """

    main: ClassVar[str | None] = "relevance"

    relevance: AScore
    share: float = Field(default=0.5, ge=0, le=1)
    times: float = Field(default=2.0, ge=1)

    def inside(self) -> tuple[Part, ...]:
        """Return the relevance."""
        return (self.relevance,)

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        size = ops.segment_count(groups.label, groups.count).long()
        frame, count = frames_of(tokens)
        frame = frame.masked_fill(groups.label < 0, -1)
        # The first token of each frame stands for it.
        first = ops.segment_first(frame, count) == ops.positions(frame)
        length = ops.segment_count(groups.label.masked_fill(~first, -1), groups.count)
        best = ops.best_groups(best_frame(tokens, groups, self.relevance), size > 0, self.share)
        weight = length.masked_fill(size == 0, 0) * (1 + (self.times - 1) * best)
        return ops.dealt_out(tokens.budget, weight, size)
