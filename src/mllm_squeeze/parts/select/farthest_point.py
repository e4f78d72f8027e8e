"""Tokens that are as different from each other as can be: DivPrune's greedy search."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.grouped import pick_in_rows
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class FarthestPoint(Select):
    """Pick each token as the farthest from those picked before, from the most isolated one on, group by group.

    arXiv 2503.02175; distance 1 - cosine in float32, O(N) per pick. It reads no score.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    """

    main: ClassVar[str | None] = "by"

    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the most diverse tokens of each group."""
        x = tokens[need_of(self.by)]
        keep = pick_in_rows(
            tokens, groups, limit, lambda rows: ops.farthest_point(rows.take(x), rows.mask, rows.limit, rows.steps)
        )
        return Picks(keep.long() - 1, (max(tokens.counts),))
