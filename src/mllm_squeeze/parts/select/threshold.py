"""All tokens above a number."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Threshold(Select):
    """Pick the tokens whose score is above a number, at least the best one of each span; it needs no budget.

    above: the number.
    of: "score" compares the score as it is; "mean" and "max" compare it with this multiple of the mean, or the largest,
        score of the span.
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False
    scored: ClassVar[bool] = True
    main: ClassVar[str | None] = "above"

    above: float
    of: Literal["score", "mean", "max"] = "score"

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the tokens above the number."""
        assert score is not None
        mask = groups.label >= 0
        keep = mask & (score > ops.scaled_bar(score, mask, self.above, self.of))
        keep = keep | ops.top_k_mask(score, mask & ~keep.any(1, keepdim=True), 1)
        return Picks(keep.long() - 1)
