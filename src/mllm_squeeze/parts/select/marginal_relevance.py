"""Tokens that are relevant and unlike those picked before."""

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


class MarginalRelevance(Select):
    """Pick tokens one by one, those of large score that are unlike the ones picked before, group by group.

    Maximal marginal relevance: the first is that of largest score, each other that of largest
    weight * score - (1 - weight) * largest cosine to one of those picked. O(N) per pick.

    weight: of the score, from 0 to 1.
    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    """

    scored: ClassVar[bool] = True
    main: ClassVar[str | None] = "weight"

    weight: float = Field(default=0.5, ge=0, le=1)
    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks."""
        assert score is not None
        x, worth = tokens[need_of(self.by)], score

        def pick(rows: Rows) -> Tensor:
            return ops.marginal_relevance(
                rows.take(x), rows.mask, rows.take(worth), rows.limit, rows.steps, self.weight
            )

        return Picks(pick_in_rows(tokens, groups, limit, pick).long() - 1)
