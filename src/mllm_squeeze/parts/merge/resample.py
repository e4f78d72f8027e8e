"""The grid of a picture on a smaller grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.parts.base import Groups
from mllm_squeeze.parts.merge.pool import Pool
from mllm_squeeze.reducers.base import Mix, Reduction, VisualTokens

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile


class Resample(Pool):
    """Replace the grid of each tile by a smaller one that is filtered from it, frame by frame.

    Sizes, places and budget are those of `pool`, but a token is a weighted sum over more than its window. Separators
    are dropped.

    filter: "dct" keeps the low frequencies of a cosine transform, arXiv 2508.06038, scaled so that a constant stays
        what it is; "linear" interpolates.

    Raises:
        UnsupportedInputError: the grid is not known, or no longer whole.
    """

    main: ClassVar[str | None] = "filter"

    filter: Literal["dct", "linear"] = "linear"

    def pick_and_merge(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Reduction:
        """Return the first token of each window, and what goes into it."""
        import torch

        mask = groups.label >= 0
        keep, entries = mask.clone(), []
        table = _cells(tokens, mask)
        for span, (current, budget, tiles) in enumerate(zip(tokens.current, tokens.counts, tokens.tiles, strict=True)):
            sizes = ops.pooled_plan(current, budget, tiles)
            if sizes is None:
                self._require_whole(current, budget)
                continue
            cells = ops.resampled_cells(tiles, tuple(sizes), self.filter)
            into, source, weight = (ops.on_device(part, mask) for part in cells)
            places = table[span]
            keep[span] = False
            keep[span].index_fill_(0, places[into], True)
            entries.append((torch.full_like(into, span), places[into], places[source], weight))
        if not entries:
            return Reduction(mask)
        return Reduction(keep, mix=Mix(*(torch.cat(part) for part in zip(*entries, strict=True))))

    def _require_whole(self, current: int, budget: int) -> None:
        if budget < current:
            raise UnsupportedInputError(
                "A grid is resampled as a whole; here it is not known, or tokens of it were cut before. Use merge: "
                "pool, which then averages runs of tokens."
            )


def _cells(tokens: VisualTokens, mask: Tensor) -> Tensor:
    """Return int64 (S, cells), the token at each cell of the tiles of a span, numbered tile by tile."""
    import torch

    starts = [_starts(tiles) for tiles in tokens.tiles]
    most = max(len(rows) for rows in starts)
    rows = ops.on_device([row + [[0, 1, 1]] * (most - len(row)) for row in starts], mask)
    tile, frame, row, column = tokens.grid.clamp(min=0).unbind(-1)
    before, height, width = ops.take(rows, tile.clamp(max=most - 1)).unbind(-1)
    cells = max((sum(tile.cells for tile in tiles) for tiles in tokens.tiles), default=0)
    cell = (before + (frame * height + row) * width + column).where(mask & (tokens.grid[..., 2] >= 0), cells)
    table = torch.zeros(len(mask), cells + 1, dtype=torch.long, device=mask.device)
    return table.scatter(1, cell.clamp(max=cells), ops.positions(mask).expand_as(mask))


def _starts(tiles: tuple[Tile, ...]) -> list[list[int]]:
    """Return (cells before, height, width) of each tile of a span."""
    rows, before = [], 0
    for tile in tiles:
        rows.append([before, tile.height, tile.width])
        before += tile.cells
    return rows or [[0, 1, 1]]
