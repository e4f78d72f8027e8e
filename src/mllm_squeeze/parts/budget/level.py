"""The same number for every group, as far as it has so many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Budget, Groups
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Level(Budget):
    """Give each group the same number, so that the sum is the budget of the span exactly.

    A group keeps no more than all its tokens; what is over goes one by one to those that have more. Ties take the first
    group.
    """

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        size = ops.segment_count(groups.label, groups.count).long()
        return ops.dealt_out(tokens.budget, (size > 0).float(), size)
