"""The best of each window of the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile


class Windows(Select):
    """Pick about as many tokens of each size x size window of the grid, those of largest score; the sum is exact.

    What is left over at the right and the lower edge belongs to the last window. Without a grid a group is one window.
    arXiv 2505.22654.

    size: cells on a side.
    fill: "even" gives each window its whole share first, and what is left of the budget to the best of the others, at
        most one more each; "best" takes the best tokens, at most the share, rounded up, of each window.
    each: how many tokens of a window "best" may take, where its share is less.
    """

    main: ClassVar[str | None] = "size"
    scored: ClassVar[bool] = True

    size: int = Field(default=6, ge=1)
    fill: Literal["even", "best"] = "even"
    each: int = Field(default=1, ge=1)

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the picks of each group."""
        assert score is not None
        there, group = groups.label >= 0, groups.label.clamp(min=0)
        window, count = self._windows(tokens, groups)
        present = ops.segment_count(window, count * groups.count) > 0
        number = present.view(len(window), groups.count, count).sum(2).clamp(min=1)
        share = limit.div(number, rounding_mode="floor").gather(1, group)
        most = (-(-limit).div(number, rounding_mode="floor")).gather(1, group)
        most = most if self.fill == "even" else most.clamp(min=self.each)
        rank = ops.rank_within(score, window, there)
        turn = (rank < most).long() + (rank < share).long() * int(self.fill == "even")
        best = ops.rank_within(score, groups.label, there)
        first = (turn * window.shape[1] - best).double()
        return Picks((there & (ops.rank_within(first, groups.label, there) < limit.gather(1, group))).long() - 1)

    def _windows(self, tokens: VisualTokens, groups: Groups) -> tuple[Tensor, int]:
        """Return int64 (S, N), the window of each token, different in different groups, and how many a span has."""
        tables = [self._table(tiles) for tiles in tokens.tiles]
        most = max((len(rows) for rows, _ in tables), default=0) or 1
        count = max((number for _, number in tables), default=1)
        rows = [rows + [[0, 1, 1]] * (most - len(rows)) for rows, _ in tables]
        tile, frame, h, w = tokens.grid.clamp(min=0).unbind(-1)
        table = ops.take(ops.on_device(rows, tokens.mask), tile.clamp(max=most - 1))
        before, high, wide = table.unbind(-1)
        row = h.div(self.size, rounding_mode="floor").minimum(high - 1)
        column = w.div(self.size, rounding_mode="floor").minimum(wide - 1)
        window = before + (frame * high + row) * wide + column
        return (groups.label * count + window).masked_fill(groups.label < 0, -1), count

    def _table(self, tiles: tuple[Tile, ...]) -> tuple[list[list[int]], int]:
        """Return (windows before, down, across) of each tile, and how many windows there are."""
        rows, before = [], 0
        for tile in tiles:
            high, wide = max(tile.height // self.size, 1), max(tile.width // self.size, 1)
            rows.append([before, high, wide])
            before += tile.frames * high * wide
        return rows, max(before, 1)
