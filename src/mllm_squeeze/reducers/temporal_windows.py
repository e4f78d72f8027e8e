"""Keep one frame of four whole, and of the others what changed: DyCoke's token merging over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.reducers.base import Reducer, Reduction, VisualTokens
from mllm_squeeze.reducers.needs import Features, Need, Place

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_squeeze.layout import Tile

WINDOW = 4
Shape = tuple[int, int, int]


def changed(features: Tensor, mask: Tensor, grid: Tensor, frame: Tensor, shape: Shape, limit: Tensor) -> Tensor:
    """Return bool (S, N): frame 0 of each window of four, and of the others the `limit` tokens that changed most.

    Frames 1 and 3 are compared with the frame before, frame 2 with frame 0, place by place, by cosine, always with the
    unpruned frame. features: (S, N, D). grid: (S, N, 4). frame: int64 (S, N), -1 for separators, which stay. shape:
    host bounds (frames, height, width). limit: int64 (S, N) or (S, 1).
    """
    step = frame % WINDOW
    back = (step > 0).long() + (step == 2)
    whole = (frame < 0) | (step == 0)
    partner = ops.same_place(grid, frame.masked_fill(~mask, -1), (frame - back).masked_fill(whole, -1), shape)
    change = -ops.paired_cosine(features, partner)
    return mask & (whole | (ops.rank_within(change, frame, mask) < limit))


class TemporalWindows(Reducer):
    """Compare the frames of each window of four place by place, and drop from frames 1 to 3 what changed least.

    DyCoke, arXiv 2411.15024, stage one (the paper speaks of merging, it drops). features (S, N, D), cosine in float32.
    The budget fixes the number kept in each of those frames, for whole windows the fraction (4 * kept - 1) / 3 (the
    paper's 1 - K), at least 0, so that at most three quarters can be removed, and less where the frames are no multiple
    of four: half of two frames, nothing of one. A budget out of reach is said in a warning. variant: "official" leaves
    frame 2 of the last window whole, as the loop bound of the authors' code does, and so keeps more than the budget.

    Differs from the authors' code: an odd last frame is not lost, up to four frames work, the tokens of a frame stay in
    raster order; ties take the lowest index; the number kept is solved from the budget. Frames without a whole window
    count too: five frames have two whole ones. Separators stay.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"projector"})
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    why_more: ClassVar[str] = f"the first frame (as the model groups them) and every {WINDOW}th after it stay whole"
    least: ClassVar[float] = 1 / WINDOW

    variant: Literal["paper", "official"] = "paper"

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut."""
        return (Features(),)

    def _frames(self, current: int, tiles: tuple[Tile, ...]) -> tuple[Shape, int]:
        """Return (frames, height, width) and the number of prunable frames; raises where they are not known."""
        shapes = {(tile.height, tile.width) for tile in tiles}
        if len(shapes) != 1 or current not in (sum(t.cells for t in tiles), sum(t.length for t in tiles)):
            raise UnsupportedInputError(
                "Windows of frames need whole frames of one size, as they come from the projector; here the grid of "
                f"the video is {tiles or 'not known'} with {current} tokens. Use a method that needs no "
                "whole frames."
            )
        ((height, width),) = shapes
        frames = sum(t.frames for t in tiles)
        return (frames, height, width), frames - -(-frames // WINDOW)

    def _sizes(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> tuple[Shape, int, int]:
        """Return (frames, height, width), the number of prunable frames, and how many tokens each of them keeps."""
        shape, prunable = self._frames(current, tiles)
        area = shape[1] * shape[2]
        fixed = current - prunable * area
        limit = min(area, max(0, (budget - fixed) // prunable)) if prunable else area
        return shape, prunable, limit

    def _spared(self, frames: int) -> int:
        """Return the frame that the official loop forgets, or -1."""
        last = frames % WINDOW or WINDOW  # frames in the last window
        return frames - last + 2 if last > 2 else -1

    def count(self, current: int, budget: int, tiles: tuple[Tile, ...]) -> int:
        """Return the number kept; raises UnsupportedInputError without whole frames."""
        (frames, height, width), prunable, limit = self._sizes(current, budget, tiles)
        spared = self.variant == "official" and self._spared(frames) >= 0
        return current - (prunable - spared) * (height * width - limit)

    def fewest(self, current: int, tiles: tuple[Tile, ...]) -> int:
        """Return the tokens of the frames that stay whole; raises like `count`."""
        (_, height, width), prunable = self._frames(current, tiles)
        return current - prunable * height * width

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Return the whole frames and what changed in the others; raises like `count`."""
        spans = list(zip(tokens.current, tokens.counts, tokens.tiles, strict=True))
        sizes = [self._sizes(*span) for span in spans]
        shapes = [s[0] for s in sizes]
        shape = (max(s[0] for s in shapes), max(s[1] for s in shapes), max(s[2] for s in shapes))
        frame = ops.frame_ids(tokens.grid, [[tile.frames for tile in tiles] for tiles in tokens.tiles])
        limits, spared = ops.on_device([[s[2] for s in sizes], [self._spared(f) for f, _, _ in shapes]], frame)
        limit = limits[:, None].expand_as(frame)
        if self.variant == "official":
            limit = limit.masked_fill(frame == spared[:, None], tokens.mask.shape[1])
        return Reduction(changed(tokens.features, tokens.mask, tokens.grid, frame, shape, limit))
