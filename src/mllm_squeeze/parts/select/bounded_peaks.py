"""The densest tokens, none of them near another."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class BoundedPeaks(Select):
    """Pick the densest token, and in falling density all that are not near one picked before, of the best by score.

    So every token of the best is near one that was picked; how many that are follows from the picture. A budget that
    the step asks for takes the densest of those picked, and then the densest of the others. arXiv 2504.08966; distance
    is 1 - cosine, memory O(tokens * tokens); it waits for the device.

    cutoff: the largest distance that is near.
    share: of all tokens, rounded down, that are looked at, those of largest score; at least one.
    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    spread: how far a token adds to the density of another.
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False
    grouped: ClassVar[bool] = False
    main: ClassVar[str | None] = "cutoff"

    cutoff: float = Field(default=0.2, ge=0, le=2)
    share: float = Field(default=1.0, gt=0, le=1)
    by: Vectors = "features"
    spread: float = Field(default=2.0, gt=0)

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks."""
        mask = groups.label >= 0
        number = ops.share_of(mask.sum(1), self.share, down=True).clamp(min=1)
        score = mask.float() if score is None else score
        best = ops.top_k_mask(score, mask, number.maximum(limit[:, 0]) if tokens.asked else number)
        centres, density = ops.bounded_peaks(tokens[need_of(self.by)], best, self.cutoff, self.spread)
        if not tokens.asked:
            return Picks(centres.long() - 1)
        first = (centres.long() * density.shape[1] + density).double()
        return Picks(ops.top_k_mask(first, best, limit[:, 0]).long() - 1)
