"""Each removed token goes into the survivor that it is most like."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Merge, Picks
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need, Size

if TYPE_CHECKING:
    from torch import Tensor


class Nearest(Merge):
    """Merge each token that was not picked into the survivor of its group with the largest cosine.

    Tokens of score -inf (separators) are neither merged nor merged into; where a group has no survivor to go into,
    tokens are dropped.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    into: all survivors, or only those of the last turn of a selection in turns.
    weights: "mean" is the plain mean of a survivor and what goes into it; "size" the mean weighted by how many tokens
        each stands for; "added_mean" the survivor plus the mean of the others; "running" averages the survivor with
        one of the others after the other, in raster order, so that later ones count more.
    within: the largest distance, 1 - cosine, over which a token is merged; one that is farther is dropped.
    """

    main: ClassVar[str | None] = "by"

    by: Vectors = "features"
    into: Literal["all", "last"] = "all"
    weights: Literal["mean", "size", "added_mean", "running"] = "mean"
    within: float | None = Field(default=None, ge=0, le=2)

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors, and the sizes where they weigh."""
        return (need_of(self.by), Size()) if self.weights == "size" else (need_of(self.by),)

    def merge(self, tokens: VisualTokens, groups: Groups, picks: Picks, score: Tensor | None) -> Reduction:
        """Return who goes into whom."""
        pieces = groups.label >= 0
        if score is not None:
            pieces = pieces & (score != -float("inf"))
        targets = (picks.last() if self.into == "last" else picks.keep) & pieces
        members = pieces & ~picks.keep
        x = tokens[need_of(self.by)]
        if groups.count == 1:
            assign = ops.nearest_target(x, targets, members, self._slots(picks, x.shape[1]))
        else:
            assign = ops.nearest_in_group(x, targets, members, groups.label)
        if self.within is not None:
            far = (1 - ops.paired_cosine(x, assign)).clamp(min=0) > self.within
            assign = assign.masked_fill(far, -1)
        assign = ops.positions(assign).where(picks.keep, assign)
        return Reduction(picks.keep, assign, self._weights(tokens, assign))

    def _slots(self, picks: Picks, width: int) -> int:
        most = picks.most[-1:] if self.into == "last" else picks.most
        return min(width, sum(most)) if picks.most else width

    def _weights(self, tokens: VisualTokens, assign: Tensor) -> Tensor | None:
        if self.weights == "mean":
            return None
        if self.weights == "running":
            return ops.running_mean_weights(assign)
        return ops.mean_weights(assign, tokens[Size()]) if self.weights == "size" else ops.added_mean_weights(assign)
