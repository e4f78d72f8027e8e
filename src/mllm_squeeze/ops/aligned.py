"""Which token of the frame before shows what a token shows, where the camera has moved by whole cells."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import in_grains, paired_cosine, unit
from .segment import same_place, segment_sum


@selection
def moved_before(
    x: Tensor, grid: Tensor, frame: Tensor, shape: tuple[int, int, int], reach: int, above: float
) -> tuple[Tensor, Tensor]:
    """Return float32 (S, N), the cosine to the token of the frame before, and int64 (S, N), which it is; else 0 and -1.

    Each frame is moved as a whole by at most so many cells down and across, by what takes most of it off: the largest
    sum over its tokens of the cosine's part above `above`. Of equal moves the shorter one counts, then that upwards,
    then that to the left. x: (S, N, d). grid: int64 (S, N, 4). frame: int64 (S, N), -1 for none. shape: host numbers
    (frames, height, width) that bound them.
    """
    x = unit(x)
    frames, height, width = shape
    # A separator stands nowhere.
    frame = frame.masked_fill(grid[..., 2] < 0, -1)
    earlier = (frame - 1).masked_fill(frame < 1, -1)
    steps = range(-reach, reach + 1)
    moves = sorted(((down, across) for down in steps for across in steps), key=lambda move: move[0] ** 2 + move[1] ** 2)
    best = torch.full((frame.shape[0], frames), -1.0, dtype=torch.float64, device=frame.device)
    alike, before = torch.zeros(frame.shape, device=frame.device), torch.full_like(frame, -1)
    for down, across in moves:
        row, column = grid[..., 2] + down, grid[..., 3] + across
        seen = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (grid[..., 2] >= 0)
        there = torch.stack([grid[..., 0], grid[..., 1], row, column], -1)
        found = _from(grid, there, frame, earlier.masked_fill(~seen, -1), shape)
        cosine = paired_cosine(x, found)
        gain = segment_sum(in_grains((cosine - above).clamp(min=0)).double(), frame, frames)
        better = gain > best
        taken = better.gather(1, frame.clamp(min=0)) & (frame >= 0)
        best = torch.where(better, gain, best)
        alike, before = torch.where(taken, cosine, alike), torch.where(taken, found, before)
    return alike, before


def _from(grid: Tensor, there: Tensor, frame: Tensor, reference: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return int64 (S, N), the index of the token at `there` in the frame `reference`; -1 where there is none."""
    # A token asks as if it stood where it looks; tokens and those that ask go side by side.
    asked = same_place(
        torch.cat([grid, there], 1),
        torch.cat([frame, torch.full_like(frame, -1)], 1),
        torch.cat([torch.full_like(frame, -1), reference], 1),
        shape,
    )
    return asked[:, frame.shape[1] :]
