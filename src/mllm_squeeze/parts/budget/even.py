"""A budget shared over the groups in proportion to their size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Budget, Groups
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Even(Budget):
    """Give each group its share by size, by largest remainder, so that the sum is the budget of the span exactly.

    Ties take the first group.
    """

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        if groups.count == 1:
            return tokens.budget[:, None]
        return ops.share_out(tokens.budget, ops.segment_count(groups.label, groups.count))
