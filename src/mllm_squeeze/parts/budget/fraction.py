"""A fraction of every group."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Budget, Groups
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Fraction(Budget):
    """Give each group a fraction of its tokens, rounded down, which may be none; one token of a span stays at least.

    A budget that the step asks for is shared in proportion to the size of the groups instead.

    keep: the fraction.
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False
    main: ClassVar[str | None] = "keep"

    keep: float = Field(gt=0, le=1)

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        size = ops.segment_count(groups.label, groups.count)
        if tokens.asked:
            return ops.share_out(tokens.budget, size)
        allotted = ops.share_of(size.long(), self.keep, down=True)
        one = ops.top_k_mask(size, size > 0, 1).long()
        return allotted.where(allotted.sum(1, keepdim=True) > 0, one)
