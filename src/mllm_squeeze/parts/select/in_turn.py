"""Several selections one after the other: a protected set, then the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, ASelect, Groups, Part, Picks, Select, Written
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Turn(Written):
    """One of the selections.

    select: how it picks, of what is left.
    share: its part of each group's budget; None takes what the others leave.
    rounded: what becomes of a share that is no whole number, "half_up" or "down".
    score: what it picks by; the score of the step by default.
    """

    select: ASelect
    share: float | None = Field(default=None, ge=0, le=1)
    rounded: Literal["half_up", "down"] = "half_up"
    score: AScore | None = None


class InTurn(Select):
    """Pick by several selections in turn, each from what those before have left.

    of: the selections; exactly one has no share and takes what the others leave of the budget.
    """

    main: ClassVar[str | None] = "of"

    of: tuple[Turn, ...]

    @model_validator(mode="after")
    def _shares(self) -> InTurn:
        given = [turn.share for turn in self.of if turn.share is not None]
        if len(given) != len(self.of) - 1 or sum(given) > 1 + 1e-9:
            raise ValueError(
                "each turn but one has a share of the budget, together at most 1, and that one takes the rest; got the "
                f"shares {[turn.share for turn in self.of]}"
            )
        for turn in self.of:
            if turn.select.decides or not turn.select.known_count or not turn.select.grouped:
                raise ValueError(
                    "a turn picks a number of the tokens that are left; a selection that says itself how many, or that "
                    f"works on whole spans only, can be none; got {type(turn.select).__name__}"
                )
        return self

    def inside(self) -> tuple[Part, ...]:
        """Return the selections and their scores."""
        return tuple(part for turn in self.of for part in (turn.select, turn.score) if part is not None)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks of all turns, each with its number."""
        limit = limit.minimum(ops.segment_count(groups.label, groups.count).long())
        shares = [
            None if turn.share is None else ops.share_of(limit, turn.share, turn.rounded == "down") for turn in self.of
        ]
        rest = limit - sum(share for share in shares if share is not None)
        turn = groups.label.clamp(max=0).masked_fill(groups.label >= 0, -1)
        for number, (step, share) in enumerate(zip(self.of, shares, strict=True)):
            left = Groups(groups.label.masked_fill(turn >= 0, -1), groups.count, groups.part, groups.widest)
            own = score if step.score is None else step.score.score(tokens, groups)
            picks = step.select.select(tokens, left, own, rest.clamp(min=0) if share is None else share)
            turn = turn.where(~picks.keep | (turn >= 0), number)
        return Picks(turn, self._most(tokens, groups.count))

    def _most(self, tokens: VisualTokens, count: int) -> tuple[int, ...]:
        """Return how many tokens of a span each turn picks at most, on the host."""
        most = [0] * len(self.of)
        for n, k in zip(tokens.current, tokens.counts, strict=True):
            budget = min(n, k)
            # Each group may round by less than one token.
            shares = [
                None if turn.share is None else ops.share_of_count(budget, turn.share, turn.rounded == "down")
                for turn in self.of
            ]
            rest = budget - sum(share or 0 for share in shares)
            given = [min(budget, (rest if share is None else share) + count - 1) for share in shares]
            most = [max(pair) for pair in zip(most, given, strict=True)]
        return tuple(most)
