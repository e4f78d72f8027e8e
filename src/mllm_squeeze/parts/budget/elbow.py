"""As many tokens as have a score above the bend of the curve."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Budget, Groups
from mllm_squeeze.parts.budget.even import Even
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Elbow(Budget):
    """Give each group as many tokens as have a score above the one where the falling curve of its scores bends.

    It bends where it is farthest from the line through its ends; at least one token stays. A budget that the step asks
    for is shared in proportion to the size of the groups instead.
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False

    @property
    def scored(self) -> bool:
        """Always."""
        return True

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        assert score is not None
        if tokens.asked:
            return Even().allot(tokens, groups, score)
        return ops.above_elbow(score, groups.label, groups.count)
