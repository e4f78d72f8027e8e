"""What is dropped goes, cell by cell of the grid, into the best of the dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.parts.base import Groups, Merge
from mllm_squeeze.reducers.base import Reduction, VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class Recycle(Merge):
    """Keep the best tokens, and merge the others of each cell of the grid into the best of them there.

    Cells are squares of `cell` x `cell` tokens of a tile and frame; as many tokens more than the budget asks for are
    merged as there would be cells, and a merged token is the mean weighted by the score, at the place of the best. How
    many cells hold something follows from the picture, so that the budget is met about. Separators stay.
    arXiv 2508.05211.

    cell: the side of a cell, in tokens; it need not be whole.

    Raises:
        UnsupportedInputError: the grid is not known.
    """

    picks: ClassVar[bool] = True
    grouped: ClassVar[bool] = False
    known_count: ClassVar[bool] = False
    main: ClassVar[str | None] = "cell"

    cell: float = Field(default=12.0, ge=1)

    def pick_and_merge(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Reduction:
        """Return the best, and what goes into the best of each cell."""
        import torch

        if not all(tokens.tiles):
            raise UnsupportedInputError(
                "What is dropped is collected on the grid of a picture, which is not known here. Use merge: nearest."
            )
        there = groups.label >= 0
        pieces = there & (tokens.grid[..., 2] >= 0)
        score = there.float() if score is None else score.float()
        number = there.sum(1)
        fewer = (number - limit[:, 0]).clamp(min=0)
        more = (number.double() / self.cell**2).floor().long().where(fewer > 0, 0)
        low = ops.top_k_mask(-score.nan_to_num(neginf=0), pieces, fewer + more)
        cell, count = self._cells(tokens)
        cell = cell.masked_fill(~low, -1)
        best = low & (ops.rank_within(score, cell, low) == 0)
        place = ops.positions(cell).expand_as(cell)
        at = torch.zeros(len(cell), count + 1, dtype=torch.int64, device=cell.device)
        target = at.scatter(1, torch.where(best, cell, count), place).gather(1, cell.clamp(min=0))
        assign = torch.where(low, target, torch.where(there, place, -1))
        weight = score.clamp(min=0).masked_fill(~low, 1)
        total = torch.zeros_like(weight).scatter_add(1, assign.clamp(min=0), weight.masked_fill(assign < 0, 0))
        share = weight / total.gather(1, assign.clamp(min=0)).clamp(min=torch.finfo(weight.dtype).tiny)
        return Reduction((there & ~low) | best, assign, share)

    def _cells(self, tokens: VisualTokens) -> tuple[Tensor, int]:
        """Return int64 (S, N), the cell of each token, different in different tiles and frames, and their number."""
        sides = [max(tile.height, tile.width) for tiles in tokens.tiles for tile in tiles]
        across = int(max(sides) / self.cell) + 1
        frames = max(tile.frames for tiles in tokens.tiles for tile in tiles)
        tile, frame, row, column = tokens.grid.clamp(min=0).unbind(-1)
        down = (row.double() / self.cell).floor().long()
        right = (column.double() / self.cell).floor().long()
        most = max(len(tiles) for tiles in tokens.tiles)
        return ((tile * frames + frame) * across + down) * across + right, most * frames * across**2
