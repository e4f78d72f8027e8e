"""Windows of a grid that one token each is left of: their sizes on the host, and the window of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .select import take
from .stride import pooled_size

Plan = list[tuple[int, int]]


class _Rectangle(Protocol):
    """A rectangle of tokens, frames x height x width."""

    @property
    def frames(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def cells(self) -> int: ...
    @property
    def length(self) -> int: ...


def pooled_plan(current: int, budget: int, tiles: Sequence[_Rectangle]) -> Plan | None:
    """Return the pooled (height, width) of each tile, None where runs are pooled: no grid, a cut before, or no cut."""
    cells = sum(tile.cells for tile in tiles)
    if budget >= current or not cells or current not in (cells, sum(tile.length for tile in tiles)):
        return None
    shares = [budget * tile.cells // cells // tile.frames for tile in tiles]
    return [pooled_size(tile.height, tile.width, share) for tile, share in zip(tiles, shares, strict=True)]


def pooled_table(plans: Sequence[Plan | None], tiles: Sequence[Sequence[_Rectangle]]) -> list[list[list[int]]]:
    """Return (height, width, pooled height, pooled width, windows before) of each tile of each span, padded by ones."""
    most = max(len(p or ()) for p in plans) or 1
    out = []
    for sizes, rectangles in zip(plans, tiles or ((),) * len(plans), strict=True):
        rows, before = [], 0
        for (h, w), tile in zip(sizes or (), rectangles if sizes else (), strict=True):
            rows.append([tile.height, tile.width, h, w, before])
            before += tile.frames * h * w
        out.append(rows + [[1, 1, 1, 1, 0]] * (most - len(rows)))
    return out


def pooled_windows(grid: Tensor, sizes: Tensor) -> Tensor:
    """Return int64 (S, N), the window of each token, -1 for separators and padding.

    grid: int64 (S, N, 4). sizes: int64 (S, tiles, 5), as `pooled_table` returns them. Cell (h, w) of a height x width
    tile goes to window (h * pooled height // height, w * pooled width // width): disjoint, none empty.
    """
    tile, t, h, w = grid.unbind(-1)
    height, width, high, wide, before = take(sizes, tile.clamp(min=0, max=sizes.shape[1] - 1)).unbind(-1)
    row = (h * high).div(height, rounding_mode="floor")
    column = (w * wide).div(width, rounding_mode="floor")
    return (before + (t * high + row) * wide + column).masked_fill(t < 0, -1)
