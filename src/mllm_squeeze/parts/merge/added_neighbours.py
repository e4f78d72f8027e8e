"""Survivors that take up the tokens most like them; all others are dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Merge, Picks
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import Mix, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class AddedNeighbours(Merge):
    """Add to each survivor its nearest tokens of the group, weighted by the score; what is near none is dropped.

    Survivors are neighbours too, a token may go into several, and weights are not normalised. A group that is all kept
    stays as it is. arXiv 2503.10742.

    most: how many neighbours, of largest cosine.
    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    """

    main: ClassVar[str | None] = "most"

    most: int = Field(default=32, ge=1)
    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def merge(self, tokens: VisualTokens, groups: Groups, picks: Picks, score: Tensor | None) -> Reduction:
        """Return what goes into the survivors."""
        import torch

        weight = tokens.mask.float() if score is None else score.float()
        weight = torch.where(weight.isfinite(), weight, 0)
        others = groups.label.masked_fill(picks.keep, -1)
        left = ops.segment_count(others, groups.count).gather(1, groups.label.clamp(min=0))
        label = groups.label.masked_fill(left == 0, -1)
        centres = picks.keep & (label >= 0)
        slots = min(label.shape[1], max(tokens.counts)) if tokens.asked else max(1, int(centres.sum(1).max()))
        x = tokens[need_of(self.by)]
        entries = [
            ops.neighbour_entries(x, weight, centres, label, self.most, slots),
            ops.unchanged_entries(picks.keep & (label < 0)),
        ]
        return Reduction(picks.keep, mix=Mix(*(torch.cat(parts) for parts in zip(*entries, strict=True))))
