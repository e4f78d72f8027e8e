"""The frames of a video."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups, Segment
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


def frames_of(tokens: VisualTokens) -> tuple[Tensor, int]:
    """Return int64 (S, N), the frame of each token, -1 for padding, and the largest number of frames of a span.

    Separators go with the first frame; where frames are not known all is one frame.
    """
    per_tile = [[tile.frames for tile in tiles] for tiles in tokens.tiles] or [[]] * len(tokens.current)
    count = max(1, *(sum(frames) for frames in per_tile))
    return ops.frame_ids(tokens.grid, per_tile).clamp(min=0).masked_fill(~tokens.mask, -1), count


class Frame(Segment):
    """Put the tokens of each frame into a group; separators go with the first frame."""

    modalities: ClassVar[frozenset[str]] = frozenset({"video"})

    def segment(self, tokens: VisualTokens) -> Groups:
        """Return one group per frame."""
        return Groups(*frames_of(tokens))
