"""Tokens that stand for all others: greedy facility location."""

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


class FacilityLocation(Select):
    """Pick tokens greedily so that every token of a group has one like it among them; likeness is (1 + cosine) / 2.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    bonus: how much of the step's score each pick adds to what it covers.
    """

    main: ClassVar[str | None] = "by"

    by: Vectors = "features"
    bonus: float = Field(default=0.0, ge=0)

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the tokens picked in each group."""
        x = tokens[need_of(self.by)]
        bonus = None if score is None or not self.bonus else score.nan_to_num(0, neginf=0) * self.bonus

        def pick(rows: Rows) -> Tensor:
            own = None if bonus is None else rows.take(bonus)
            return ops.facility_location(rows.take(x), rows.mask, rows.limit, rows.steps, own)

        return Picks(pick_in_rows(tokens, groups, limit, pick).long() - 1, (max(tokens.counts),))
