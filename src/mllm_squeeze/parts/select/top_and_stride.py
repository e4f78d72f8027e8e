"""The best tokens and an even sample beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.grouped import Rows, pick_in_rows
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class TopAndStride(Select):
    """Pick the tokens of largest score, and beside them every so-many-th token in raster order.

    Where the budget decides, its number are the best ones, k of n; the sample comes on top, every floor(n / k) //
    `denser`-th token but the last. A budget that the step asks for is met exactly: the share `top` of it are the best
    ones, the rest is an even sample of the other tokens. PruMerge+, arXiv 2403.15388.

    denser: how many times denser the sample is than the best ones.
    top: the share of the best ones, half rounded up.
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False
    scored: ClassVar[bool] = True

    denser: int = Field(default=3, ge=1)
    top: float = Field(default=0.25, ge=0, le=1)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the best ones, in turn 0, and the sample."""
        assert score is not None
        best = ops.share_of(limit, self.top).minimum(limit) if tokens.asked else limit

        def pick_best(rows: Rows) -> Tensor:
            return ops.top_k_mask(rows.take(score), rows.mask, rows.limit)

        def pick_sample(rows: Rows) -> Tensor:
            pieces = rows.mask & (rows.take(score) != -float("inf"))
            n = pieces.sum(1)
            step = n.div(rows.limit.clamp(min=1), rounding_mode="floor").div(self.denser, rounding_mode="floor")
            place = ops.local_index(pieces)
            last = place == (n - 1)[:, None]
            return pieces & ~last & (place % step.clamp(min=1)[:, None] == 0) & (rows.limit > 0)[:, None]

        def pick_rest(rows: Rows) -> Tensor:
            pieces = rows.mask & (rows.take(score) != -float("inf"))
            picked = ops.stride_mask(pieces, rows.limit) & (rows.limit > 0)[:, None]
            return picked | ops.top_k_mask(rows.mask.float(), rows.mask & ~pieces, rows.limit - picked.sum(1))

        first = pick_in_rows(tokens, groups, best, pick_best)
        if tokens.asked:
            second = pick_in_rows(tokens, groups, limit - best, pick_rest, (groups.label >= 0) & ~first)
        else:
            second = pick_in_rows(tokens, groups, limit, pick_sample)
        return Picks((2 * second.long() - 1).masked_fill(second, 1).masked_fill(first, 0))
