"""The best tokens, at places of the grid that no frame of the group has taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class OtherPlaces(Select):
    """Pick the best tokens of each group, one at each place of the grid before any place has a second.

    Of the frames of a group the one of largest score stands first at a place; these are picked by score, then the
    second ones, and so on. Attention that falls on the same places of all frames then keeps no copies. arXiv
    2505.20100.

    Raises:
        UnsupportedInputError: the grid is not known.
    """

    scored: ClassVar[bool] = True

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks."""
        assert score is not None
        if not all(tokens.tiles):
            raise UnsupportedInputError(
                "Tokens are picked at different places of the grid, and the grid of this input is not known. Write "
                "select: top_k."
            )
        width = max(tile.width for tiles in tokens.tiles for tile in tiles)
        row, column = tokens.grid[..., 2], tokens.grid[..., 3]
        place = (row * width + column).masked_fill(row < 0, -1)
        return Picks(ops.other_places(score, place, groups.label, groups.count, limit).long() - 1)
