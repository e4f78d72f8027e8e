"""The best tokens, early ones first, beside tokens that are different and tokens that are far apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile


class Balanced(Select):
    """Pick the best tokens, those that are most different, and those farthest apart on the grid; then fill the budget.

    Each of the three picks by itself, so that they may share tokens; where they are more than the budget, the best come
    first, then those of the grid. What is missing are the tokens of largest distance, 1 - cosine, to what is there.
    arXiv 2505.22038.

    best: the share of the budget, rounded down, that are the best by score.
    enlarged: of how many more they are chosen, as causal attention favours late tokens; of these, those among the first
        tokens, as many as the budget, come before the others.
    early: False takes all of the enlarged set.
    different: the share of the budget, rounded down, picked as the farthest from each other.
    apart: the share of the budget, rounded down, picked as the farthest on the grid of each tile and frame.
    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.

    Raises:
        UnsupportedInputError: `apart` is given, and the grid is not known.
    """

    main: ClassVar[str | None] = "best"
    grouped: ClassVar[bool] = False
    scored: ClassVar[bool] = True

    best: float = Field(default=1.0, ge=0, le=1)
    enlarged: float = Field(default=1.0, ge=1)
    early: bool = True
    different: float = Field(default=0.0, ge=0, le=1)
    apart: float = Field(default=0.0, ge=0, le=1)
    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks."""
        assert score is not None
        mask = groups.label >= 0
        x, total = tokens[need_of(self.by)], limit[:, 0].minimum(mask.sum(1))
        most = min(mask.shape[1], max(tokens.counts))
        worth = 4 * self._best(score, mask, total).long()
        if self.apart:
            worth = worth + 2 * self._apart(tokens, mask).long()
        if self.different:
            number = ops.share_of(total, self.different, down=True)
            worth = worth + ops.farthest_point(x, mask, number, most).long()
        taken = (worth > 0) & (ops.rank_within(worth.float(), worth.clamp(max=0), mask) < total[:, None])
        keep = ops.farthest_from(x, mask, taken, total - taken.sum(1), most, most)
        return Picks(keep.long() - 1)

    def _best(self, score: Tensor, mask: Tensor, total: Tensor) -> Tensor:
        number = ops.share_of(total, self.best, down=True)
        larger = (number.double() * self.enlarged).floor().long()
        candidates = ops.top_k_mask(score, mask, larger)
        if not self.early:
            return candidates
        early = ops.local_index(mask) < total[:, None]
        rank = ops.ranks(score, mask)
        first = (early.long() * mask.shape[1] - rank).double()
        return ops.top_k_mask(first, candidates, number)

    def _apart(self, tokens: VisualTokens, mask: Tensor) -> Tensor:
        """Return bool (S, N), the tokens in the cells that are far apart."""
        import torch

        if not all(tokens.tiles):
            raise UnsupportedInputError(
                "Tokens that are far apart are found on the grid of a picture, which is not known here. Leave "
                "out apart."
            )
        tables = [self._cells(tiles, n) for tiles, n in zip(tokens.tiles, tokens.counts, strict=True)]
        most = max(len(tiles) for tiles in tokens.tiles)
        starts = [rows + [[0, 1, 1]] * (most - len(rows)) for rows, _ in tables]
        cells = max(len(there) for _, there in tables)
        chosen = ops.on_device([there + [0] * (cells - len(there)) for _, there in tables], mask).bool()
        tile, frame, h, w = tokens.grid.clamp(min=0).unbind(-1)
        before, high, wide = ops.take(ops.on_device(starts, mask), tile).unbind(-1)
        cell = before + (frame * high + h) * wide + w
        return mask & (tokens.grid[..., 2] >= 0) & torch.gather(chosen, 1, cell)

    def _cells(self, tiles: tuple[Tile, ...], count: int) -> tuple[list[list[int]], list[int]]:
        """Return (cells before, height, width) of each tile, and for each cell of a span whether it is picked."""
        frames = [tile.height * tile.width for tile in tiles for _ in range(tile.frames)]
        shares = iter(ops.share_counts(int(count * self.apart), frames))
        rows: list[list[int]] = []
        there: list[int] = []
        for tile in tiles:
            rows.append([len(there), tile.height, tile.width])
            for _ in range(tile.frames):
                picked = set(ops.spread_cells(tile.height, tile.width, next(shares)))
                there += [int(cell in picked) for cell in range(tile.height * tile.width)]
        return rows, there
