"""Squares of a frame whose parts are alike become one, and then those of the next frame that they are like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.parts.segment.frame import frame_tables
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile
    from mllm_squeeze.ops import QuadtreeLevel

# Halvings of the interval of cosines: finer than what two features differ by.
_STEPS = 16


@dataclass(frozen=True)
class _Merged:
    """Whom the tokens of a video go into, int64 (T * P,), and with what weight, float32 (T * P,)."""

    into: Tensor
    weight: Tensor

    def left(self) -> int:
        """Return how many stay; it waits for the device."""
        return int((self.into == _places(self.into)).sum())


class SquareTrees(Reducer):
    """Merge squares of a frame whose parts are alike, and squares of consecutive frames that are alike at one place.

    STTM, arXiv 2507.07990. A frame is a quadtree: cells, squares of 2 x 2 of them, and so on; of an odd number of rows
    or columns the first is alone. From the largest squares down, one whose parts all have at least this cosine to their
    mean stays whole and becomes that mean. Then two squares of consecutive frames are linked where one lies in the
    other, or is the same, and their cosine is not below a second number; what hangs together becomes one token, at
    the first cell of its first square. How many stay follows from the video. A budget that is asked for raises or
    lowers both numbers, their difference as it is, until no more stay, and sets the tokens free that are least like
    what they went into, until as many do. It waits for the device.

    alike: the smallest cosine of a square to its parts.
    over_time: the smallest cosine of squares that are linked; None links none.
    skip: how many of the coarsest levels are left out; the one above them has two rows or two columns.
    mean: of what hangs together: "squares" count alike, or by their "cells".
    links: "all" joins whatever is linked; "early" ends as the authors' code does, where of two squares that are linked
        with a third in the next frame one may be left alone.

    Differs from the authors' code: where rows or columns are odd, squares at the edge are compared with what they are
    made of, not with the first cell of their frame too, so that fewer of them are split; a budget is asked for as such.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector", "layer"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    known_count: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    why_more: ClassVar[str] = "the largest squares of a frame stay, and those of all frames if none are linked"

    alike: float = Field(default=0.85, ge=-1, le=1)
    over_time: float | None = Field(default=0.55, ge=-1, le=1)
    skip: int = Field(default=1, ge=0)
    mean: Literal["squares", "cells"] = "squares"
    links: Literal["all", "early"] = "all"

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut."""
        return (Features(),)

    def fewest(self, current: int, tiles: tuple[Tile, ...]) -> int:
        """Return the squares of the coarsest level, of one frame where frames are merged too."""
        if not tiles:
            return 1
        rows, columns = ops.quadtree_sides(tiles[0].height, tiles[0].width, self.skip)[-1]
        return rows * columns * (sum(tile.frames for tile in tiles) if self.over_time is None else 1)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return who stays, and what goes into it."""
        place = ops.positions(tokens.mask).expand_as(tokens.mask)
        assign = place.masked_fill(~tokens.mask, -1).clone()
        weights = tokens.mask.float()
        for span, token in enumerate(frame_tables(tokens)):
            if tokens.asked and tokens.counts[span] >= tokens.current[span]:
                continue
            # What is no piece of the picture stays, and counts.
            beside = tokens.current[span] - token.numel()
            x = tokens.features[span].float()[token]
            merged = self._clip(x, tokens, span, tokens.counts[span] - beside if tokens.asked else None)
            assign[span, token.flatten()] = token.flatten()[merged.into]
            weights[span, token.flatten()] = merged.weight
        return Reduction((assign == place) & tokens.mask, assign, weights)

    def _clip(self, x: Tensor, tokens: VisualTokens, span: int, budget: int | None) -> _Merged:
        """Return whom the tokens of a video (T, P, D) go into."""
        height, width = _grid_of(tokens, span, x.shape[1])
        levels = ops.quadtree_levels(x.unflatten(1, (height, width)), self.skip)
        if budget is None:
            return self._merged(levels, self.alike)
        # Nothing is below the one bar, and nothing but what has no parts above the other.
        low, high = -1.01, 1.01
        merged = self._merged(levels, low)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            tried = self._merged(levels, middle)
            if tried.left() <= budget:
                low, merged = middle, tried
            else:
                high = middle
        return _freed(x.flatten(0, 1), merged, budget)

    def _merged(self, levels: list[QuadtreeLevel], alike: float) -> _Merged:
        """Return whom the tokens go into where squares stay whole from a cosine on."""
        import torch

        first, weight, mean = ops.quadtree_squares(levels, alike)
        frames, places = first.shape
        square = (first + torch.arange(frames, device=first.device)[:, None] * places).flatten()
        own = (square == _places(square)).float()
        into = square
        if self.over_time is not None:
            # Of two squares that share a cell one lies in the other.
            unit = ops.unit(mean)
            linked = (unit[1:] * unit[:-1]).sum(-1).flatten() >= alike + self.over_time - self.alike
            before, after = square[:-places], square[places:]
            into = ops.linked_first(before, after.where(linked, before), len(square), self.links == "all")[square]
        ones = torch.ones_like(own)
        cells = torch.zeros_like(own).index_add(0, square, ones)[square]
        counted = own if self.mean == "squares" else ones
        total = torch.zeros_like(own).index_add(0, into, counted)[into]
        part = 1.0 if self.mean == "squares" else cells
        return _Merged(into, weight.flatten() * part / total)


def _places(like: Tensor) -> Tensor:
    import torch

    return torch.arange(len(like), device=like.device)


def _grid_of(tokens: VisualTokens, span: int, places: int) -> tuple[int, int]:
    """Return the height and width of the frames of one span.

    Raises:
        UnsupportedInputError: some places hold no token in any frame.
    """
    tile = tokens.tiles[span][0]
    if places != tile.height * tile.width:
        raise UnsupportedInputError(
            f"Squares are made of whole frames; here frames of {tile.height} x {tile.width} hold {places} tokens, as "
            "the attention mask hides the others or an earlier cut took them. Show whole frames, or use segment: frame "
            "instead."
        )
    return tile.height, tile.width


def _freed(x: Tensor, merged: _Merged, budget: int) -> _Merged:
    """Return a merge of which as many tokens as there are still too few stay as they are. x: (N, D)."""
    into, place = merged.into, _places(merged.into)
    assign = into[None]
    states = ops.merge_tokens(x[None], assign, merged.weight[None])
    far = -(ops.unit(x[None]) * ops.unit(states[:, into])).sum(-1)
    free = ops.top_k_mask(far, assign != place, max(0, budget - merged.left()))[0]
    weight = merged.weight.masked_fill(free, 0)
    total = weight.new_zeros(len(weight)).index_add(0, into, weight)[into]
    return _Merged(place.where(free, into), (weight / total).masked_fill(free, 1))
