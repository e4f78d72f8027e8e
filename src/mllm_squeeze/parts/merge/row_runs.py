"""Runs of like neighbours in a row of the grid become one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.parts.base import Groups, Merge
from mllm_squeeze.parts.merge.adjacent import runs_of
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Need, Place

if TYPE_CHECKING:
    from torch import Tensor


class RowRuns(Merge):
    """Merge runs of neighbours in a row of the grid: each token that is like the one on its left joins it.

    Only neighbours are compared, so that a slow change may make a long run; a run is the mean of its tokens, at the
    place of the first. Rows, frames and tiles are never joined, and separators stay. A budget that the step asks for
    joins as many as leave, the most alike, but each row keeps a token. arXiv 2506.03990.

    above: the cosine above which a token joins the one on its left.
    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.

    Raises:
        UnsupportedInputError: the grid is not known.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video"})
    known_count: ClassVar[bool] = False
    picks: ClassVar[bool] = True
    decides: ClassVar[bool] = True
    grouped: ClassVar[bool] = False
    main: ClassVar[str | None] = "above"
    why_more: ClassVar[str | None] = "each row of a frame keeps at least one token"

    above: float = Field(default=0.6, ge=-1, le=1)
    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def pick_and_merge(self, tokens: VisualTokens, groups: Groups, score: Tensor | None, limit: Tensor) -> Reduction:
        """Return the first of each run, and what goes into it."""
        mask = groups.label >= 0
        number = (mask.sum(1) - limit[:, 0]).clamp(min=0)

        def sites(row: Tensor, x: Tensor) -> Tensor:
            return ops.adjacent_sites(x, row, number) if tokens.asked else ops.sites_above(x, row, self.above)

        assign = runs_of(_rows(tokens), tokens[need_of(self.by)], sites, mask)
        return Reduction(assign == ops.positions(assign), assign)


def _rows(tokens: VisualTokens) -> Tensor:
    """Return int64 (S, N), the row of its frame and tile that each token stands in, -1 for separators and padding."""
    if not all(tokens.tiles):
        raise UnsupportedInputError(
            "Neighbours in a row of the grid are joined, and the grid of this picture is not known. Write "
            "merge: nearest, or merge: pool."
        )
    tiles = [tile for rectangles in tokens.tiles for tile in rectangles]
    frames, height = max(tile.frames for tile in tiles), max(tile.height for tile in tiles)
    tile, frame, row, _ = tokens.grid.unbind(-1)
    return ((tile * frames + frame) * height + row).masked_fill((row < 0) | ~tokens.mask, -1)
