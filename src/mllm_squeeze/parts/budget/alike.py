"""One token for each group whose tokens are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Budget, Groups
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


class Alike(Budget):
    """Give one token to each group whose tokens are alike, mean cosine of all pairs, and all to the others.

    A budget that the step asks for is met exactly: the most alike groups are left with one token each until it is.
    arXiv 2411.10803.

    threshold: the smallest mean cosine of a group whose tokens are alike.
    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False
    main: ClassVar[str | None] = "threshold"

    threshold: float = Field(default=0.8, ge=-1, le=1)
    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        size = ops.segment_count(groups.label, groups.count).long()
        likeness = ops.group_likeness(tokens[need_of(self.by)], groups.label, groups.count)
        if tokens.asked:
            return ops.without_the_alike(likeness, size, tokens.budget)
        return size.where(likeness < self.threshold, size.clamp(max=1))
