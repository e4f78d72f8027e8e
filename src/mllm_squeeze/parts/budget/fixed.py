"""The same number for every group."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import field_validator

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Budget, Groups
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Fixed(Budget):
    """Give each group the same number, or the same fraction of it, whatever the budget of the step: it needs none.

    keep: tokens of each group (an int, at least 1), or the fraction of it (a float above 0, at most 1, half rounded up,
        at least one token).
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False
    main: ClassVar[str | None] = "keep"

    keep: int | float

    @field_validator("keep")
    @classmethod
    def _keep(cls, keep: int | float) -> int | float:
        if (isinstance(keep, int) and keep < 1) or (isinstance(keep, float) and not 0 < keep <= 1):
            raise ValueError(
                "keep is the tokens kept of each group (an int, at least 1) or the fraction kept (a float above 0, at "
                f"most 1); got {keep}"
            )
        return keep

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        size = ops.segment_count(groups.label, groups.count).long()
        if isinstance(self.keep, int):
            return size.clamp(max=self.keep)
        return ops.share_of(size, self.keep).clamp(min=1).minimum(size)
