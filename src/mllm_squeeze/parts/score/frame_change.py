"""How much a token differs from what was at its place one frame before."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Score
from mllm_squeeze.parts.segment.frame import frames_of, size_of_frames
from mllm_squeeze.parts.vectors import Vectors, need_of
from mllm_squeeze.reducers.base import VisualTokens
from mllm_squeeze.reducers.needs import Need

if TYPE_CHECKING:
    from torch import Tensor

# More than any distance: there is nothing before the first frame.
_NEW = 255.0


class FrameChange(Score):
    """Score a token by 1 - cosine to the token at its place one frame before; the first frame comes before all others.

    Separators get -inf. arXiv 2510.14624.

    by: the vectors that are compared, see `mllm_squeeze.parts.vectors`.

    Raises:
        UnsupportedInputError: the frames are not known, or not of one size.
    """

    modalities: ClassVar[frozenset[str]] = frozenset({"video"})
    main: ClassVar[str | None] = "by"

    by: Vectors = "features"

    def needs(self) -> tuple[Need, ...]:
        """Return the vectors."""
        return (need_of(self.by),)

    def score(self, tokens: VisualTokens, groups: Groups) -> Tensor:
        """Return how much changed."""
        alike, before = likeness_before(tokens, need_of(self.by))
        change = (1 - alike).masked_fill(before < 0, _NEW)
        return change.masked_fill(tokens.grid[..., 1] < 0, -float("inf"))


def likeness_before(tokens: VisualTokens, need: Need) -> tuple[Tensor, Tensor]:
    """Return float32 (S, N), the cosine to the token at the same place one frame before, and int64 (S, N), which it is.

    need: the vectors. Where there is none before the cosine is 0 and the token -1.

    Raises:
        UnsupportedInputError: the frames are not known, or not of one size.
    """
    height, width = size_of_frames(tokens)
    frame, count = frames_of(tokens)
    earlier = (frame - 1).masked_fill(frame < 1, -1)
    before = ops.same_place(tokens.grid, frame, earlier, (count, height, width))
    return ops.paired_cosine(tokens[need], before), before
