"""Tokens that are as different from each other as can be: DivPrune's greedy search."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.grouped import Rows, pick_in_rows, worth
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class FarthestPoint(Select):
    """Pick each token as the farthest from those picked before, from the most isolated one on, group by group.

    arXiv 2503.02175; distance 1 - cosine in float32, O(N) per pick. It reads no score, unless that is a weight.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    weight: the power of the step's score that distances are multiplied by; the first pick is then the token of largest
        score. None for no weight. Numbers below 0, and the score -inf of separators, count as 0.
    """

    main: ClassVar[str | None] = "by"

    by: Vectors = "features"
    weight: float | None = Field(default=None, gt=0)

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the most diverse tokens of each group."""
        x = tokens[need_of(self.by)]
        weight = None if score is None or self.weight is None else worth(score) ** self.weight

        def pick(rows: Rows) -> Tensor:
            own = None if weight is None else rows.take(weight)
            return ops.farthest_point(rows.take(x), rows.mask, rows.limit, rows.steps, own)

        return Picks(pick_in_rows(tokens, groups, limit, pick).long() - 1, (max(tokens.counts),))
