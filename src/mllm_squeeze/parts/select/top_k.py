"""The best tokens of each group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class TopK(Select):
    """Pick the tokens of largest score in each group; ties take the lowest index.

    Without a score the first tokens of each group are picked.
    """

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the best `limit` (S, groups.count) tokens of each group."""
        score = tokens.mask.float() if score is None else score
        if groups.count == 1:
            keep = ops.top_k_mask(score, groups.label >= 0, limit[:, 0])
        else:
            rank = ops.rank_within(score, groups.label, tokens.mask)
            keep = (groups.label >= 0) & (rank < limit.gather(1, groups.label.clamp(min=0)))
        return Picks(keep.long() - 1)
