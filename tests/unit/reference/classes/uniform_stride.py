"""Keep an even sample of the grid: the baseline that looks at nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Place

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile


def even_sample(
    mask: Tensor, budget: Tensor, current: tuple[int, ...], counts: tuple[int, ...], tiles: tuple[tuple[Tile, ...], ...]
) -> Tensor:
    """Return bool (S, N), `budget` (S,) tokens, even over the grid where it is one whole rectangle, else over the list.

    mask: bool (S, N). current, counts: tokens now and budget on the host. tiles: empty where no grid is to be used.
    """
    keep = ops.stride_mask(mask, budget)
    for row, (n, k, rectangles) in enumerate(zip(current, counts, tiles, strict=False)):
        if len(rectangles) == 1 and rectangles[0].cells == n:
            tile = rectangles[0]
            pattern = ops.on_device(ops.grid_pattern(tile.frames, tile.height, tile.width, k), mask)
            keep[row] = pattern[ops.local_index(mask[row : row + 1])[0].clamp(min=0)] & mask[row]
    return keep


class UniformStride(Reducer):
    """Keep an even sample of each span; no paper, S spans at once, mask bool (S, N).

    grid: on a span that is one whole rectangle the frames, rows and columns are sampled (h x w centred cells of nearly
    the same aspect, what is left of the budget evenly over the other cells), because a stride over the list picks
    stripes; False, and every other span, takes token floor(i * N / n) for i < n.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})

    grid: bool = True

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the sampled tokens of each span."""
        tiles = tokens.tiles if self.grid else ()
        return Reduction(even_sample(tokens.mask, tokens.budget, tokens.current, tokens.counts, tiles))
