"""Removed tokens go to those that they look at, and that the words they look at look at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Merge, Picks
from mllm_squeeze.parts.score.redundancy import ASKED, ASKING, KEY, QUERY, given_to
from mllm_squeeze.reducers.base import Mix, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need, Place

if TYPE_CHECKING:
    from torch import Tensor


class Correlated(Merge):
    """Merge each token that was not picked into those that it has most to do with, directly and by way of the words.

    arXiv 2411.17686. That is share * a[i, j] + (1 - share) * what goes from i to the words and from them to j, in the
    block before the cut; a token goes to those above a quantile of its row, at least one. Works on whole spans.

    of: "attention" is the softmax over visual tokens and words, and the mean over words; a token goes to survivors,
        and these become the mean weighted by 1 and the parts of what they get. "logits" is the products of queries and
        keys, and the sum over words; a token goes to any, what goes to one that leaves is lost, and what a survivor
        gets is added to it, by the softmax of the row.
    share: of what is direct.
    quantile: of each row.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"layer"})
    grouped: ClassVar[bool] = False
    main: ClassVar[str | None] = "of"

    of: Literal["attention", "logits"] = "attention"
    share: float = Field(default=0.6, ge=0, le=1)
    quantile: float = Field(default=0.998, ge=0, le=1)

    def needs(self) -> tuple[Need, ...]:
        """Return queries and keys of both sides."""
        return QUERY, KEY, ASKED, ASKING

    def merge(self, tokens: VisualTokens, groups: Groups, picks: Picks, score: Tensor | None) -> Reduction:
        """Return what goes into the survivors."""
        soft = self.of == "attention"
        keep = picks.keep
        removed = [max(0, n - k) for n, k in zip(tokens.current, tokens.counts, strict=True)]
        index, filled = ops.compact_indices(tokens.mask & ~keep, max(1, *removed))
        direct, to_words = given_to(tokens, ops.take(tokens[QUERY], index), self.of)
        from_words, _ = given_to(tokens, tokens[ASKING], self.of)
        alike = ops.correlation(direct, to_words, from_words, tokens.words, self.share, soft)
        looked_at = [min(n, k) if soft else n for n, k in zip(tokens.current, tokens.counts, strict=True)]
        numbers = [self._number(n) for n in looked_at]
        number = ops.on_device(numbers, keep)
        among = keep if soft else tokens.mask
        entries = ops.entries_to_correlated(alike, index, filled, keep, among, number, max(numbers), soft)
        return Reduction(keep, mix=Mix(*entries))

    def _number(self, looked_at: int) -> int:
        """Return how many of a row of so many are above the quantile, or at it where one is there."""
        place = round(self.quantile * max(0, looked_at - 1), 9)
        if self.of == "attention":
            return max(1, looked_at - math.ceil(place))
        return max(1, looked_at - 1 - math.floor(place))
