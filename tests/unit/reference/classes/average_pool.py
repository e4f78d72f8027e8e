"""Average windows of the token grid: the pooling baseline (M3, DeCo, LLaVA-NeXT video)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Place

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile

Plan = list[tuple[int, int]]


def plan(current: int, budget: int, tiles: tuple[Tile, ...]) -> Plan | None:
    """Return the pooled (height, width) of each tile, None where runs are pooled: no grid, a cut before, or no cut."""
    cells = sum(tile.cells for tile in tiles)
    if budget >= current or not cells or current not in (cells, sum(tile.length for tile in tiles)):
        return None
    shares = [budget * tile.cells // cells // tile.frames for tile in tiles]
    return [ops.pooled_size(tile.height, tile.width, share) for tile, share in zip(tiles, shares, strict=True)]


def table(plans: list[Plan | None], tiles: tuple[tuple[Tile, ...], ...]) -> list[list[list[int]]]:
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


def windows(grid: Tensor, sizes: Tensor) -> Tensor:
    """Return int64 (S, N), the window of each token, -1 for separators and padding.

    grid: int64 (S, N, 4). sizes: int64 (S, tiles, 5), as `table` returns them. Cell (h, w) of a height x width tile
    goes to window (h * pooled height // height, w * pooled width // width): disjoint, none empty.
    """
    tile, t, h, w = grid.unbind(-1)
    height, width, high, wide, before = ops.take(sizes, tile.clamp(min=0, max=sizes.shape[1] - 1)).unbind(-1)
    row = (h * high).div(height, rounding_mode="floor")
    column = (w * wide).div(width, rounding_mode="floor")
    return (before + (t * high + row) * wide + column).masked_fill(t < 0, -1)


class AveragePool(Reducer):
    """Replace each window of each tile's grid by its mean; the windows are disjoint and tile the grid, frame by frame.

    Reads the grid (S, N, 4) only. A tile gets its share of the budget by area and each frame of it the same; the
    pooled grid fills that share as well as a nearly unchanged aspect allows, so the budget is met from below (but each
    frame keeps one token). Separators are dropped. Where the grid is not known or no longer whole, runs of consecutive
    tokens are averaged. arXiv 2405.17430 (M3) and 2405.20985 (DeCo) train with such tokens; here it is training-free,
    behind the projector.

    Differs from the authors' code: windows are disjoint where the sides do not divide, instead of overlapping, and any
    budget is allowed (M3's code returns all tokens where the kernel is no whole number).
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    merges: ClassVar[bool] = True
    why_more: ClassVar[str] = "each frame or tile keeps at least one token"

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return the number of windows."""
        sizes = plan(current, budget, tiles)
        if sizes is None:
            return min(current, budget)
        return sum(tile.frames * h * w for tile, (h, w) in zip(tiles, sizes, strict=True))

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the first token of each window, with all its tokens assigned to it."""
        mask, tiles = tokens.mask, tokens.tiles
        spans = zip(tokens.current, tokens.counts, tiles or ((),) * len(tokens.current), strict=True)
        plans = [plan(*span) for span in spans]
        groups = windows(tokens.grid, ops.on_device(table(plans, tiles), mask))
        runs = (ops.local_index(mask) * tokens.budget[:, None]).div(
            mask.sum(1, keepdim=True).clamp(min=1), rounding_mode="floor"
        )
        runs = runs.where(tokens.budget[:, None] < mask.sum(1, keepdim=True), ops.local_index(mask))
        gridded = ops.on_device([int(p is not None) for p in plans], mask)[:, None] > 0
        groups = groups.where(gridded, runs).masked_fill(~mask, -1)
        assign = ops.segment_first(groups, mask.shape[1])
        return Reduction(assign == ops.positions(assign), assign)
