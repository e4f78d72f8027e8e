"""As many tokens as have a score that stands out."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Budget, Groups
from mllm_squeeze.parts.budget.even import Even
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Outliers(Budget):
    """Give each group as many tokens as have a score above its third quartile by `factor` quartile distances.

    At least one. A budget that the step asks for is shared in proportion to the size of the groups instead.

    factor: how many quartile distances.
    beside: how many tokens more each group keeps: 1 where a merge leaves one more than was picked.
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False
    main: ClassVar[str | None] = "factor"

    factor: float = Field(default=1.5, ge=0)
    beside: int = Field(default=0, ge=0)

    @property
    def scored(self) -> bool:
        """Always."""
        return True

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        assert score is not None
        if tokens.asked:
            return Even().allot(tokens, groups, score)
        size = ops.segment_count(groups.label, groups.count).long()
        found = ops.outlier_counts(score, groups.label, groups.count, self.factor)
        return (found.clamp(min=1) + self.beside).minimum(size)
