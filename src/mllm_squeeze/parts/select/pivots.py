"""A few pivots and the tokens least like them: DART."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need, Normed, Place, Projection

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile


class Pivots(Select):
    """Pick the tokens of largest score as pivots, and in turn those least similar to them and to pivot words.

    DART, arXiv 2502.11494. Words are ranked by the L1 norm of their keys; likeness is the cosine of states after the
    language model's final norm (S, N, D). What the visual pivots leave of the budget is shared evenly among all.

    pivots, words: how many pivots are visual tokens and how many are words.
    variant: "paper" keeps the budget exactly; "official" adds the visual pivots to floor(budget / pivots) tokens per
        pivot, as the authors' code does (128 keeps 132, 60 keeps 60).

    Differs from the authors' code: pivots take turns by descending norm, visual ones first (the code follows the hash
    order of a set); with fewer words than pivots the others take their share; a budget below the number of visual
    pivots keeps the largest of them; a ratio is turned into a whole number of tokens before it is shared (0.778 of 576
    keeps 132, the code 124). The paper's duplication threshold is used by neither.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    grouped: ClassVar[bool] = False
    scored: ClassVar[bool] = True

    pivots: int = Field(default=4, ge=1)
    words: int = Field(default=4, ge=0)
    variant: Literal["paper", "official"] = "paper"

    def needs(self) -> tuple[Need, ...]:
        """Return the keys of the words and normed states of both sides."""
        return (Projection("key", of="text"), Normed(), Normed("text"))

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return the budget, or for the official variant what its sharing makes of it."""
        if self.variant == "official" and budget < current:
            every = self.pivots + self.words
            budget = self.pivots + budget // every * every
        return min(current, budget)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the pivots and the tokens that are least like them."""
        assert score is not None
        mask = groups.label >= 0
        spoken = tokens[Projection("key", of="text")].float().abs().sum(-1)
        keep = ops.pivots_and_dissimilar(
            score,
            tokens[Normed()],
            mask,
            spoken,
            tokens[Normed("text")],
            tokens.words,
            self._total(limit[:, 0], mask.sum(1)),
            self.pivots,
            self.words,
        )
        return Picks(keep.long() - 1)

    def _total(self, limit: Tensor, current: Tensor) -> Tensor:
        """Return what `count` says, on the device."""
        if self.variant == "paper":
            return limit.minimum(current)
        every = self.pivots + self.words
        shared = self.pivots + limit.div(every, rounding_mode="floor") * every
        return shared.where(limit < current, limit).minimum(current)
