"""The tiles of a picture."""

from __future__ import annotations

from mllm_squeeze.parts.base import Groups, Segment
from mllm_squeeze.reducers.base import VisualTokens


class Tile(Segment):
    """Put the tokens of each tile into a group; separators go with the first tile, and all where no grid is known."""

    def segment(self, tokens: VisualTokens) -> Groups:
        """Return one group per tile."""
        count = max((len(tiles) for tiles in tokens.tiles), default=0) or 1
        label = tokens.grid[..., 0].clamp(min=0, max=count - 1).masked_fill(~tokens.mask, -1)
        return Groups(label, count)
