"""More of the budget for groups that are unlike the rest: VidCom2's frame budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Budget, Groups, Part
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Softmax(Budget):
    """Scale the mean share of each group by 1 + p - 1 / groups, p the softmax of the groups' mean scores.

    A group keeps at most all of its tokens and at least one, half to even, so that the sum may miss the budget by
    rounding. arXiv 2505.14454.

    temperature: of the softmax; the smaller it is, the more goes to the group of largest score.
    score: what groups are judged by; the score of the pipeline by default.
    """

    known_count: ClassVar[bool] = False
    main: ClassVar[str | None] = "temperature"
    why_more: ClassVar[str | None] = "each group keeps at least one token"

    temperature: float = Field(default=0.01, gt=0)
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
        own = score if self.score is None else self.score.score(tokens, groups)
        assert own is not None
        size = ops.segment_count(groups.label, groups.count)
        mean = ops.segment_mean(own, groups.label, groups.count)
        return ops.untypical_share(mean, size, tokens.budget, self.temperature)
