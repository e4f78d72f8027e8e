"""A share for the overview of a tiled picture, and for each crop by how much of what stands out lies in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import AScore, Budget, Groups, Part
from mllm_squeeze.parts.segment.crop import crop_tables
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile


class Overview(Budget):
    """Give the overview a share of the budget, and each crop what is left by the marks that lie where it shows.

    Groups are crops (`segment: crop`), the first one the overview: the picture is an overview and a rectangle of crops.
    The best tokens of the overview, the fraction 1 - share of them, are the marks. Where nothing is marked inside of
    the crops, and in pictures of another form, all groups share by size. arXiv 2408.10945.

    marks: the score by which they are picked.
    share: of the overview.
    variant: "quadrants" finds the crop that shows the place of a mark, and keeps the budget to the token; "official"
        cuts the list of marks, in raster order, into as many equal pieces as there are crops, and rounds down.
    """

    known_count: ClassVar[bool] = False
    main: ClassVar[str | None] = "marks"

    marks: AScore
    share: float = Field(default=0.5, ge=0, le=1)
    variant: Literal["quadrants", "official"] = "quadrants"

    def inside(self) -> tuple[Part, ...]:
        """Return the score of marks."""
        return (self.marks,)

    def allot(self, tokens: VisualTokens, groups: Groups, score: Tensor | None) -> Tensor:
        """Return int64 (S, groups.count)."""
        size = ops.segment_count(groups.label, groups.count).long()
        even = ops.share_out(tokens.budget, size)
        if groups.count == 1:
            return even
        forms = ops.on_device([_form(tiles) for tiles in tokens.tiles], tokens.mask)
        official = self.variant == "official"
        first = groups.label == 0
        marked = first & ops.top_k_mask(
            self.marks.score(tokens, groups), first, ops.share_of(size[:, 0], 1 - self.share, down=True)
        )
        crop = ops.crop_shown(tokens.grid, first, forms, by_list=official)
        weight = ops.segment_sum(marked.float(), crop.masked_fill(~first, -1), groups.count)
        weight[:, 0] = 0
        split = ops.overview_split(tokens.budget, size, weight, self.share, exact=not official)
        tiled = (forms[:, 0] > 0) & (weight.sum(1) > 0)
        return split.where(tiled[:, None], even)


def _form(tiles: tuple[Tile, ...]) -> tuple[int, int, int, int]:
    """Return (rows of crops, columns, rows of the overview, its columns), zeros where there is none of both."""
    if len(tiles) != 2 or tiles[0].frames != 1 or tiles[1].frames != 1:
        return 0, 0, 0, 0
    overview, (_, (_, across, *_)) = tiles[0], crop_tables(tiles)[0]
    high = -(-tiles[1].height // min(tiles[0].height, tiles[1].height))
    return high, across, overview.height, overview.width
