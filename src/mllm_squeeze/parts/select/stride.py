"""Tokens at even distances in a list."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.grouped import Rows, pick_in_rows
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Stride(Select):
    """Pick tokens at even distances in each group, in raster order.

    Tokens of score -inf (separators) come last, in order, where there is too little else.

    step: of n tokens and k to pick, "even" takes token floor(i * n / k) for i < k, "whole" takes floor(n / k) as the
        distance, so that what is left over stands at the end.
    """

    main: ClassVar[str | None] = "step"

    step: Literal["even", "whole"] = "even"

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the tokens at even distances."""
        score = tokens.mask.float() if score is None else score

        def pick(rows: Rows) -> Tensor:
            pieces = rows.mask & (rows.take(score) != -float("inf"))
            strided = ops.stride_mask if self.step == "even" else ops.whole_stride_mask
            picked = strided(pieces, rows.limit) & (rows.limit > 0)[:, None]
            # Where the pieces of the picture are too few, the first of the others fill the budget.
            return picked | ops.top_k_mask(rows.mask.float(), rows.mask & ~pieces, rows.limit - picked.sum(1))

        return Picks(pick_in_rows(tokens, groups, limit, pick).long() - 1, (max(tokens.counts),))
