"""The crops of a tiled picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Segment
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile


def crop_tables(tiles: tuple[Tile, ...]) -> tuple[list[list[int]], int]:
    """Return (crops before, crops across, top, left, height, width) of each tile of a span, and how many crops it has.

    A tile larger than the smallest one is several crops of that one's size, whose padding was cut off evenly on both
    sides: top and left are the rows and columns that are gone.
    """
    rows, before = [], 0
    for tile in tiles:
        unit = min(tiles, key=lambda one: one.height * one.width)
        high, wide = -(-tile.height // unit.height), -(-tile.width // unit.width)
        top, left = (high * unit.height - tile.height) // 2, (wide * unit.width - tile.width) // 2
        rows.append([before, wide, top, left, unit.height, unit.width])
        before += high * wide
    return rows, max(before, 1)


def crops_of(tokens: VisualTokens) -> tuple[Tensor, int]:
    """Return int64 (S, N), the crop of each token, -1 for padding, and the largest number of crops of a span.

    Separators go with the first crop; where no grid is known all is one crop.
    """
    spans = [crop_tables(tiles) for tiles in tokens.tiles] or [([], 1)]
    most = max(len(rows) for rows, _ in spans) or 1
    table = ops.on_device(
        [rows + [[0, 1, 0, 0, 1 << 30, 1 << 30]] * (most - len(rows)) for rows, _ in spans], tokens.mask
    )
    tile, _, h, w = tokens.grid.unbind(-1)
    numbers = ops.take(table.expand(len(tile), -1, -1), tile.clamp(min=0, max=most - 1))
    before, wide, top, left, height, width = numbers.unbind(-1)
    row, column = (h + top).div(height, rounding_mode="floor"), (w + left).div(width, rounding_mode="floor")
    label = (before + row * wide + column).masked_fill(h < 0, 0)
    return label.masked_fill(~tokens.mask, -1), max(count for _, count in spans)


class Crop(Segment):
    """Put the tokens of each crop of a picture into a group; separators go with the first, and all without a grid.

    A tile is a crop; one that is larger than the smallest tile of its picture (the packed crops of LLaVA-NeXT beside
    their overview) is cut into crops of that size, as they were before their padding was cut off.
    """

    def segment(self, tokens: VisualTokens) -> Groups:
        """Return one group per crop."""
        return Groups(*crops_of(tokens))
