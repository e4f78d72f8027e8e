"""Tokens that keep the distribution of all: the largest log-determinant."""

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


class LogDet(Select):
    """Pick tokens greedily for the largest log det(I + gamma * A A^T) of those picked, group by group.

    A = Y Y^T, Y the vectors with each channel divided by its length over the tokens of the group, so that no channel
    speaks for all, and tokens of large norm come first. arXiv 2602.20205. It reads no score; O(N * N) per pick.

    by: the vectors, see `mllm_squeeze.parts.vectors`.
    gamma: the weight of A beside the identity.
    """

    main: ClassVar[str | None] = "by"

    by: Vectors = "features"
    gamma: float = Field(default=0.01, gt=0)

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the tokens picked in each group."""
        x = tokens[need_of(self.by)]

        def pick(rows: Rows) -> Tensor:
            return ops.log_det(rows.take(x), rows.mask, rows.limit, rows.steps, self.gamma)

        return Picks(pick_in_rows(tokens, groups, limit, pick).long() - 1, (max(tokens.counts),))
