"""All removed tokens become one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Merge, Picks
from mllm_squeeze.reducers.base import Reduction, VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class FusedToken(Merge):
    """Fuse all tokens of a span that were not picked into one, which stands at the place of the best of them.

    It counts: the selection picks one token less than the budget.

    weights: "mean", or "score" for the mean weighted by the score of the step (negative numbers count as 0).
    """

    grouped: ClassVar[bool] = False
    spare: ClassVar[int] = 1
    main: ClassVar[str | None] = "weights"

    weights: Literal["mean", "score"] = "mean"

    def merge(self, tokens: VisualTokens, groups: Groups, picks: Picks, score: Tensor | None) -> Reduction:
        """Return what is fused into the one token."""
        others = (groups.label >= 0) & ~picks.keep
        score = others.float() if score is None else score
        place = ops.top_k_mask(score, others, 1)
        first = place.long().argmax(1, keepdim=True)
        itself = ops.positions(others).expand_as(others)
        assign = itself.masked_fill(~picks.keep, -1).where(~others, first)
        size = score.nan_to_num(0, neginf=0).clamp(min=0) if self.weights == "score" else None
        if size is not None:
            # Where no score counts all count alike.
            none = (size.masked_fill(~others, 0).sum(1, keepdim=True) == 0) | picks.keep
            size = size.masked_fill(none, 1)
        return Reduction(picks.keep | place, assign, None if size is None else ops.mean_weights(assign, size))
