"""Anchors, what stands beside them on the grid, and the best of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.parts.base import AScore, Groups, Part, Picks, Select
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Anchors(Select):
    """Pick the best tokens by another score as anchors, their four neighbours, and the best of the rest by the score.

    The share is that of anchors and neighbours together, so a fifth of it, rounded half to even, are anchors. Anchors
    come first, then neighbours, where there are more of them than the budget. arXiv 2508.00553.

    by: what anchors are picked by.
    share: of the budget of each group.
    border: "strict" neighbours stand on the grid; "wrap" counts cells row by row, so that a neighbour may stand at the
        other end of the next row, and what lies outside is the first or last cell.

    Raises:
        UnsupportedInputError: the grid is not known.
    """

    main: ClassVar[str | None] = "by"
    scored: ClassVar[bool] = True

    by: AScore
    share: float = Field(default=0.1, ge=0, le=1)
    border: Literal["strict", "wrap"] = "strict"

    def inside(self) -> tuple[Part, ...]:
        """Return the score of anchors."""
        return (self.by,)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks of each group."""
        assert score is not None
        slots = max((tile.cells for tiles in tokens.tiles for tile in tiles), default=0)
        if not all(tokens.tiles):
            raise UnsupportedInputError(
                "Neighbours are found on the grid of a picture, which is not known here. Use select: top_k instead."
            )
        label = groups.label
        there, mine = label >= 0, label.clamp(min=0)
        number = (limit.double() * self.share / 5).round().long()
        anchors = there & (ops.rank_within(self.by.score(tokens, groups), label, there) < number.gather(1, mine))
        near = there & ops.beside_on_grid(anchors, tokens.grid, label, groups.count, slots, self.border == "wrap")
        rank = ops.rank_within(score, label, there)
        # Anchors before neighbours before all others, and each by the score.
        first = (2 * anchors.long() + (near & ~anchors).long()) * label.shape[1] - rank
        keep = there & (ops.rank_within(first.double(), label, there) < limit.gather(1, mine))
        return Picks(keep.long() - 1)
