"""The means of windows of the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Merge
from mllm_squeeze.reducers.base import Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Place

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile


class Pool(Merge):
    """Replace each window of each tile's grid by its mean; the windows are disjoint and tile the grid, frame by frame.

    Reads the grid (S, N, 4) only. A tile gets its share of the budget by area and each frame of it the same; the
    pooled grid fills that share as well as a nearly unchanged aspect allows, so the budget is met from below (but each
    frame keeps one token). Separators are dropped. Where the grid is not known or no longer whole, runs of consecutive
    tokens are averaged. arXiv 2405.17430 (M3) and 2405.20985 (DeCo) train with such tokens; here it is training-free.

    Differs from the authors' code: windows are disjoint where the sides do not divide, instead of overlapping, and any
    budget is allowed (M3's code returns all tokens where the kernel is no whole number).
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    picks: ClassVar[bool] = True
    grouped: ClassVar[bool] = False
    why_more: ClassVar[str | None] = "each frame or tile keeps at least one token"

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return the number of windows."""
        sizes = ops.pooled_plan(current, budget, tiles)
        if sizes is None:
            return min(current, budget)
        return sum(tile.frames * h * w for tile, (h, w) in zip(tiles, sizes, strict=True))

    def pick_and_merge(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Reduction:
        """Return the first token of each window, with all its tokens assigned to it."""
        mask, tiles = groups.label >= 0, tokens.tiles
        spans = zip(tokens.current, tokens.counts, tiles or ((),) * len(tokens.current), strict=True)
        plans = [ops.pooled_plan(*span) for span in spans]
        window = ops.pooled_windows(tokens.grid, ops.on_device(ops.pooled_table(plans, tiles), mask))
        runs = (ops.local_index(mask) * limit).div(mask.sum(1, keepdim=True).clamp(min=1), rounding_mode="floor")
        runs = runs.where(limit < mask.sum(1, keepdim=True), ops.local_index(mask))
        gridded = ops.on_device([int(plan is not None) for plan in plans], mask)[:, None] > 0
        window = window.where(gridded, runs).masked_fill(~mask, -1)
        assign = ops.segment_first(window, mask.shape[1])
        return Reduction(assign == ops.positions(assign), assign)
