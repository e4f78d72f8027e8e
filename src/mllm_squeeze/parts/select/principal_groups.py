"""Tokens in groups by the principal part that they belong to, the unlike ones of each group first."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.grouped import Rows, pick_in_rows
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class PrincipalGroups(Select):
    """Pick tokens from the groups that the principal parts of their span make, each group's unlike ones first.

    A quarter as many parts as tokens are asked for; a token belongs to the part that it has most of. In a group those
    come first that are like none before them, by falling rank, and groups share the budget by how many these are.
    arXiv 2603.09480. One decomposition of N x N per group of the step; it waits for the device.

    by: the vectors, see `mllm_squeeze.parts.vectors`.
    rank: "score" ranks by the score of the step, and two tokens are alike above n / 32 times the mean cosine of all
        pairs; "part" ranks by how much a token has of its part, at least four parts, and the bar is the larger of 1 and
        18 n / N, times the sum of the upper triangle of cosines by N * N.
    """

    main: ClassVar[str | None] = "by"

    by: Vectors = "features"
    rank: Literal["score", "part"] = "score"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks of each group."""
        x = tokens[need_of(self.by)]
        ranked = score if self.rank == "score" else None
        if self.rank == "score" and ranked is None:
            ranked = (groups.label >= 0).float()

        def pick(rows: Rows) -> Tensor:
            own = rows.take(x)
            mine = None if ranked is None else rows.take(ranked).nan_to_num(neginf=0)
            asked = rows.limit + int(mine is not None)
            parts = asked.div(4, rounding_mode="floor").clamp(min=1 if mine is not None else 4)
            parts = parts.minimum(rows.limit.clamp(min=1))
            most = max((rows.steps + 1) // 4, 4)
            found = ops.principal_parts(own, rows.mask, most)
            return ops.picked_of_parts(found, own, mine, rows.mask, rows.limit, parts)

        return Picks(pick_in_rows(tokens, groups, limit, pick).long() - 1)
