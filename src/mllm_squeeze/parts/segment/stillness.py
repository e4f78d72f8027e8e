"""What stands still in a video and what moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Segment
from mllm_squeeze.parts.segment.frame import frames_of, size_of_frames
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Features, Need

if TYPE_CHECKING:
    from torch import Tensor


class Stillness(Segment):
    """Tell what stands still from what moves, window by window: two groups per window, the parts static and dynamic.

    A place of the grid stands still in a window where each of its tokens has at least this cosine to the token at the
    same place one frame before, inside the window. A window of one frame is dynamic.

    threshold: the smallest cosine of what stands still.
    frames: frames per window, None for the whole video.

    Raises:
        UnsupportedInputError: the frames are not known, or not whole and of one size.
    """

    parts: ClassVar[tuple[str, ...]] = ("static", "dynamic")
    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    main: ClassVar[str | None] = "threshold"

    threshold: float = Field(default=0.8, ge=-1, le=1)
    frames: int | None = Field(default=None, ge=2)

    def needs(self) -> tuple[Need, ...]:
        """Return the states at the place of the cut."""
        return (Features(),)

    def segment(self, tokens: VisualTokens) -> Groups:
        """Return the groups 2 * window for what is static, 2 * window + 1 for what is dynamic."""
        height, width = size_of_frames(tokens)
        frame, count = frames_of(tokens)
        window = self.frames or count
        within = (frame % window).masked_fill(frame < 0, -1)
        before = ops.same_place(tokens.grid, frame, (frame - 1).masked_fill(within < 1, -1), (count, height, width))
        calm = (ops.paired_cosine(tokens.features, before) >= self.threshold) | (before < 0)
        number = frame.div(window, rounding_mode="floor")
        windows = -(-count // window)
        static = self._still(tokens, frame, number, calm, (windows, height, width))
        label = (2 * number + (~static).long()).masked_fill(~tokens.mask, -1)
        return Groups(label, 2 * windows, part=(label % 2).masked_fill(label < 0, -1))

    def _still(
        self, tokens: VisualTokens, frame: Tensor, number: Tensor, calm: Tensor, shape: tuple[int, int, int]
    ) -> Tensor:
        """Return bool (S, N), the tokens at places that are calm in all frames of a window of at least two frames."""
        windows, height, width = shape
        cell = tokens.grid[..., 2].clamp(min=0) * width + tokens.grid[..., 3].clamp(min=0)
        piece = tokens.mask & (tokens.grid[..., 1] >= 0)
        place = (number * height * width + cell).masked_fill(~piece, -1)
        cells = windows * height * width
        share = ops.segment_mean(calm.float(), place, cells)
        several = ops.segment_count(place, cells) > 1
        return ((share >= 1) & several).gather(1, place.clamp(min=0)) & piece
