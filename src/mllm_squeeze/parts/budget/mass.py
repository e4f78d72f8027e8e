"""As many tokens as hold a share of the score."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Budget, Groups
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Mass(Budget):
    """Give each group the fewest tokens whose scores add up to a share of all its scores; it needs no budget.

    share: the share of the sum of the scores, which are taken as not negative; at least one token stays.
    """

    decides: ClassVar[bool] = True
    known_count: ClassVar[bool] = False
    main: ClassVar[str | None] = "share"

    share: float = Field(gt=0, le=1)

    @property
    def scored(self) -> bool:
        """Always."""
        return True

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        assert score is not None
        return ops.fewest_with_mass(score, groups.label, groups.count, self.share)
