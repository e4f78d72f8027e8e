"""Each removed token goes into the nearest survivor: clusters around what was picked."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Merge, Picks
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class Cluster(Merge):
    """Replace each survivor by the mean of the tokens of its group that are nearest to it, in Euclidean distance.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    """

    main: ClassVar[str | None] = "by"

    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def merge(self, tokens: VisualTokens, groups: Groups, picks: Picks, score: Tensor | None) -> Reduction:
        """Return who goes into whom."""
        return Reduction(picks.keep, ops.closest_survivor(tokens[need_of(self.by)], picks.keep, groups.label))
