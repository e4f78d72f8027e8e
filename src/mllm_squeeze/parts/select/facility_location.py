"""Tokens that stand for all others: greedy facility location."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.grouped import Rows, pick_in_rows, worth
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class FacilityLocation(Select):
    """Pick tokens greedily so that every token of a group has one like it among them.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    bonus: how much of the step's score each pick adds to what it covers.
    weight: the power of the step's score that what a pick covers is multiplied by, None for no weight. Numbers below 0,
        and the score -inf of separators, count as 0.
    likeness: "halved" is (1 + cosine) / 2, "cosine" the cosine, 0 where it is negative.
    """

    main: ClassVar[str | None] = "by"

    by: Vectors = "features"
    bonus: float = Field(default=0.0, ge=0)
    weight: float | None = Field(default=None, gt=0)
    likeness: Literal["halved", "cosine"] = "halved"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the tokens picked in each group."""
        x = tokens[need_of(self.by)]
        bonus = None if score is None or not self.bonus else score.nan_to_num(0, neginf=0) * self.bonus
        weight = None if score is None or self.weight is None else worth(score) ** self.weight

        def pick(rows: Rows) -> Tensor:
            more, times = (None if one is None else rows.take(one) for one in (bonus, weight))
            clipped = self.likeness == "cosine"
            return ops.facility_location(rows.take(x), rows.mask, rows.limit, rows.steps, more, times, clipped)

        return Picks(pick_in_rows(tokens, groups, limit, pick).long() - 1, (max(tokens.counts),))
