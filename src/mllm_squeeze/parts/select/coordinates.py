"""Tokens at places from which rotary embedding tells all others, and those whose values the words are like."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need, Place, Projection, Rotary

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDED = 10**9


class Coordinates(Select):
    """Pick tokens at which rotary embedding turns least or a quarter, and those whose values are like the words'.

    The first are coordinates: of largest mean cosine of all angles, and of largest mean sine. Values are compared as
    queries and keys are, in the block before the cut: the tokens most like the words are seeds, which then ask beside
    them. Seeds and coordinates come first. arXiv 2602.03060.

    axis: the share of all tokens that are coordinates by cosine, and by sine; at most a fifth of the budget each.
    seeds: the share of all tokens that are seeds, at least one.
    among: "visual" compares a row with the visual tokens only, "all" with all tokens of the prompt.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    grouped: ClassVar[bool] = False

    axis: float = Field(default=0.1, ge=0, le=0.5)
    seeds: float = Field(default=0.01, ge=0, le=1)
    among: Literal["visual", "all"] = "visual"

    def needs(self) -> tuple[Need, ...]:
        """Return the values of both sides, and where the tokens are turned to."""
        own = (self._values("visual"), self._values("text"), Rotary())
        return own if self.among == "visual" else (*own, self._values("all"))

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks."""
        mask, total = groups.label >= 0, limit[:, 0]
        axis = [
            min(self._of(n, self.axis), self._of(k, 0.2)) for n, k in zip(tokens.current, tokens.counts, strict=True)
        ]
        coordinates = self._coordinates(tokens, mask, ops.on_device(axis, mask))
        seeds, likeness = self._likeness(tokens, mask)
        first = (2 * seeds.long() + coordinates.long()).clamp(max=2)
        order = ops.ranks(likeness, mask)
        return Picks(ops.top_k_mask((first * mask.shape[1] - order).double(), mask, total).long() - 1)

    def _coordinates(self, tokens: VisualTokens, mask: Tensor, number: Tensor) -> Tensor:
        cosine, sine = tokens[Rotary()].chunk(2, dim=-1)
        return ops.top_k_mask(cosine.mean(-1), mask, number) | ops.top_k_mask(sine.mean(-1), mask, number)

    def _likeness(self, tokens: VisualTokens, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return bool (S, N), the seeds, and float32 (S, N), how like a token is to the words and the seeds."""
        visual, text, words = tokens[self._values("visual")], tokens[self._values("text")], tokens.words
        number = [max(1, self._of(n, self.seeds)) for n in tokens.current]
        asked = self._rows(tokens, text, words, mask)
        said = asked.sum(1) / words.sum(1, keepdim=True).clamp(min=1)
        seeds = ops.top_k_mask(said, mask, ops.on_device(number, mask))
        index, filled = ops.compact_indices(seeds, max(number))
        more = self._rows(tokens, ops.take(visual, index), filled, mask)
        count = words.sum(1, keepdim=True) + filled.sum(1, keepdim=True)
        return seeds, (asked.sum(1) + more.sum(1)) / count.clamp(min=1)

    def _rows(self, tokens: VisualTokens, rows: Tensor, row_mask: Tensor, mask: Tensor) -> Tensor:
        """Return float32 (S, R, N), how like some values are to those of the visual tokens."""
        if self.among == "visual":
            return ops.value_likeness(rows, row_mask, tokens[self._values("visual")], mask)
        need = self._values("all")
        among = tokens.among[need]
        whole = ops.value_likeness(rows, row_mask, tokens[need], among.present)
        return whole.gather(2, among.place[:, None].expand(-1, whole.shape[1], -1))

    def _values(self, of: Literal["visual", "text", "all"]) -> Projection:
        return Projection("value", of=of, heads="each")

    def _of(self, number: int, share: float) -> int:
        # Half to even, as the authors round.
        return round(round(number * share * _ROUNDED) / _ROUNDED)


class CoordinatesAndBest(Coordinates):
    """As `coordinates`, beside the share `best` of all tokens by likeness: how many that is follows from the picture.

    A budget that the step asks for is kept instead.

    axis: the share of all tokens that are coordinates by cosine, and by sine.
    seeds: the share of all tokens that are seeds, at least one.
    among: "visual" compares a row with the visual tokens only, "all" with all tokens of the prompt.
    best: the share of all tokens.
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False

    best: float = Field(default=0.2, ge=0, le=1)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks."""
        if tokens.asked:
            return super().select(tokens, groups, score, limit)
        mask = groups.label >= 0
        axis, best = (
            ops.on_device([self._of(n, share) for n in tokens.current], mask) for share in (self.axis, self.best)
        )
        _, likeness = self._likeness(tokens, mask)
        keep = self._coordinates(tokens, mask, axis) | ops.top_k_mask(likeness, mask, best)
        return Picks((keep | ops.top_k_mask(likeness, mask & ~keep.any(1, keepdim=True), 1)).long() - 1)
