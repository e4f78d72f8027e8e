"""An even sample of the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Picks, Select
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class EvenSample(Select):
    """Pick an even sample of each span; it reads no score.

    grid: on a span that is one whole rectangle the frames, rows and columns are sampled (h x w centred cells of nearly
        the same aspect, what is left of the budget evenly over the other cells), because a stride over the list picks
        stripes; False, and every other span, takes token floor(i * N / n) for i < n.
    """

    grouped: ClassVar[bool] = False
    main: ClassVar[str | None] = "grid"

    grid: bool = True

    def select(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Picks:
        """Return the sampled tokens of each span."""
        mask = groups.label >= 0
        keep = ops.stride_mask(mask, limit[:, 0])
        tiles = tokens.tiles if self.grid else ()
        for row, (n, k, rectangles) in enumerate(zip(tokens.current, tokens.counts, tiles, strict=False)):
            if len(rectangles) == 1 and rectangles[0].cells == n:
                tile = rectangles[0]
                pattern = ops.on_device(ops.grid_pattern(tile.frames, tile.height, tile.width, k), mask)
                keep[row] = pattern[ops.local_index(mask[row : row + 1])[0].clamp(min=0)] & mask[row]
        return Picks(keep.long() - 1, (max(tokens.counts),))
