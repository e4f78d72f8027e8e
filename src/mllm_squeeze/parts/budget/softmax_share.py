"""A budget shared by the softmax of what groups score."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Budget, Groups, Part
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class SoftmaxShare(Budget):
    """Share the budget over the groups by the softmax of their mean scores, times their size, by largest remainder.

    A group keeps no more than all its tokens; what is over is dealt one by one to the others, those of largest share
    first, round after round. A group may keep nothing. arXiv 2503.10742.

    temperature: of the softmax; the smaller it is, the more goes to the group of largest score.
    score: what groups are judged by; the score of the pipeline by default.
    """

    main: ClassVar[str | None] = "temperature"

    temperature: float = Field(default=1.0, gt=0)
    score: AScore | None = None

    def inside(self) -> tuple[Part, ...]:
        """Return the score."""
        return () if self.score is None else (self.score,)

    @property
    def scored(self) -> bool:
        """True unless it has a score of its own."""
        return self.score is None

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        size, share = self._shares(tokens, groups, score)
        return ops.dealt_out(tokens.budget, share, size)

    def _shares(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (int64, float64) (S, groups.count), the size of each group and its share of the budget."""
        own = score if self.score is None else self.score.score(tokens, groups)
        assert own is not None
        size = ops.segment_count(groups.label, groups.count)
        return size.long(), ops.softmax_shares(own, groups.label, size, self.temperature)


class ClippedSoftmaxShare(SoftmaxShare):
    """Share the budget like softmax_share, each group's share rounded down, and lose what a group has no room for.

    Fewer stay than are asked for where few groups get most of it; one token of a span stays at least.

    temperature: of the softmax.
    score: what groups are judged by; the score of the pipeline by default.
    """

    known_count: ClassVar[bool] = False

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        size, share = self._shares(tokens, groups, score)
        # What is a whole number but for rounding is one.
        allotted = (tokens.budget[:, None] * share + 1e-6).floor().long().minimum(size)
        allotted = size.where((tokens.budget >= size.sum(1))[:, None], allotted)
        one = ops.top_k_mask(share, size > 0, 1).long()
        return allotted.where(allotted.sum(1, keepdim=True) > 0, one)
