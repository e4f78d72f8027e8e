"""The frames of a video."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
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


def size_of_frames(tokens: VisualTokens) -> tuple[int, int]:
    """Return the largest height and width of the frames, all of one size in a video.

    Raises:
        UnsupportedInputError: the frames are not known, or not of one size.
    """
    shapes = {(tile.height, tile.width) for tiles in tokens.tiles for tile in tiles}
    if not shapes or any(len({(tile.height, tile.width) for tile in tiles}) != 1 for tiles in tokens.tiles):
        raise UnsupportedInputError(
            "What stands still is found by comparing frames of one size place by place; here the grid of a video "
            f"is {tokens.tiles or 'not known'}. Use segment: frame instead."
        )
    return max(height for height, _ in shapes), max(width for _, width in shapes)


def frame_tables(tokens: VisualTokens) -> list[Tensor]:
    """Return int64 (T, P) for each span, the token at each place of each frame, without separators.

    Raises:
        UnsupportedInputError: the frames are not known, not of one size, or not whole.
    """
    import torch

    height, width = size_of_frames(tokens)
    frame, count = frames_of(tokens)
    pieces = tokens.mask & (tokens.grid[..., 2] >= 0)
    place = (frame * height + tokens.grid[..., 2]) * width + tokens.grid[..., 3]
    tables = []
    for span in range(len(frame)):
        table = torch.full((count * height * width,), -1, device=frame.device)
        table[place[span][pieces[span]]] = pieces[span].nonzero().flatten()
        table = table.view(count, -1)
        table = table[(table >= 0).any(1)][:, (table >= 0).any(0)]
        if (table < 0).any():
            raise UnsupportedInputError(
                f"Frames are compared place by place; here {int((table < 0).sum())} of {table.numel()} places of a "
                "video hold no token, as the attention mask hides them or an earlier cut took them. Show whole frames, "
                "or use segment: frame instead."
            )
        tables.append(table)
    return tables


class Frame(Segment):
    """Put the tokens of each frame into a group; separators go with the first frame."""

    modalities: ClassVar[frozenset[str]] = frozenset({"video"})

    def segment(self, tokens: VisualTokens) -> Groups:
        """Return one group per frame."""
        return Groups(*frames_of(tokens))
