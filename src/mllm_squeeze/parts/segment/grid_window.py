"""Small rectangles of the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Segment
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from mllm_squeeze.layout import Tile


class GridWindow(Segment):
    """Put the tokens of each size x size rectangle of each frame of each tile into a group.

    Rectangles at the right and the lower edge may be smaller; separators go with the first, and all where no grid is
    known.

    size: cells on a side.
    """

    main: ClassVar[str | None] = "size"

    size: int = Field(default=2, ge=1)

    def segment(self, tokens: VisualTokens) -> Groups:
        """Return one group per rectangle."""
        spans = [self._windows(tiles) for tiles in tokens.tiles] or [([], 1)]
        most = max(len(rows) for rows, _ in spans) or 1
        table = ops.on_device([rows + [[0, 1, 1]] * (most - len(rows)) for rows, _ in spans], tokens.mask)
        tile, t, h, w = tokens.grid.clamp(min=0).unbind(-1)
        before, high, wide = ops.take(table.expand(len(tile), -1, -1), tile.clamp(max=most - 1)).unbind(-1)
        row, column = (side.div(self.size, rounding_mode="floor") for side in (h, w))
        label = before + (t * high + row) * wide + column
        return Groups(label.masked_fill(~tokens.mask, -1), max(count for _, count in spans))

    def _windows(self, tiles: tuple[Tile, ...]) -> tuple[list[list[int]], int]:
        """Return (windows before, windows down, windows across) of each tile, and how many there are in all."""
        rows, before = [], 0
        for tile in tiles:
            high, wide = -(-tile.height // self.size), -(-tile.width // self.size)
            rows.append([before, high, wide])
            before += tile.frames * high * wide
        return rows, max(before, 1)
