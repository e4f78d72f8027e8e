"""Tokens that are left when those most like another are dropped, a few at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.grouped import Rows, pick_in_rows
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class DropAlike(Select):
    """Pick what is left when the tokens most like another are dropped in rounds: every second one against the others.

    arXiv 2412.01818. Tokens stand in a list by descending score; a round compares those at even places with those at
    odd ones and drops the most alike of the former. Tokens of score -inf (separators) come last, where there is too
    little else.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    at_once: how many tokens a round drops at most.
    """

    scored: ClassVar[bool] = True
    main: ClassVar[str | None] = "by"

    by: Vectors = "features"
    at_once: int = Field(default=8, ge=1)

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return what is left of each group."""
        assert score is not None
        x = tokens[need_of(self.by)]

        def pick(rows: Rows) -> Tensor:
            own = rows.take(score)
            pieces = rows.mask & (own != -float("inf"))
            picked = ops.drop_alike_in_rounds(rows.take(x), own, pieces, rows.limit, self.at_once)
            return picked | ops.top_k_mask(rows.mask.float(), rows.mask & ~pieces, rows.limit - picked.sum(1))

        return Picks(pick_in_rows(tokens, groups, limit, pick).long() - 1, (max(tokens.counts),))
