"""Sums, means and first members of groups of tokens, and the frame that a token belongs to.

Throughout, `groups` is int64 (S, N): the group of each token, from 0 to count - 1, or -1 for none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import at_least_float32, on_device


def segment_sum(x: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the sum over each group, (S, count, ...) in float32 or better, from x (S, N, ...)."""
    x = at_least_float32(x)
    tail = x.shape[2:]
    # One more group takes the tokens that belong to none.
    out = x.new_zeros(x.shape[0], count + 1, *tail)
    index = torch.where(groups < 0, count, groups).view(*groups.shape, *(1,) * len(tail)).expand_as(x)
    return out.scatter_add(1, index, x)[:, :count]


def segment_count(groups: Tensor, count: int) -> Tensor:
    """Return float32 (S, count), the number of tokens in each group."""
    return segment_sum(torch.ones(groups.shape, device=groups.device), groups, count)


def segment_mean(x: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the mean over each group, (S, count, ...) in float32 or better, zero for empty groups."""
    n = segment_count(groups, count).clamp(min=1)
    return segment_sum(x, groups, count) / n.view(*n.shape, *(1,) * (x.dim() - 2))


def segment_first(groups: Tensor, count: int) -> Tensor:
    """Return int64 (S, N), for each token the lowest index in its group; -1 for tokens of no group."""
    width = groups.shape[1]
    safe = torch.where(groups < 0, count, groups)
    index = torch.arange(width, device=groups.device)[None].expand_as(groups)
    first = torch.full((groups.shape[0], count + 1), width, dtype=torch.int64, device=groups.device)
    first = first.scatter_reduce(1, safe, index, reduce="amin")
    return torch.where(groups < 0, -1, first.gather(1, safe))


def segment_max(x: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the largest number of each group, (S, count) in float32 or better, -inf for empty ones, from x (S, N)."""
    x = at_least_float32(x)
    out = x.new_full((x.shape[0], count + 1), -torch.inf)
    return out.scatter_reduce(1, torch.where(groups < 0, count, groups), x, reduce="amax")[:, :count]


def frame_ids(grid: Tensor, frames: Sequence[Sequence[int]]) -> Tensor:
    """Return int64 (S, N), the frame of each token counted through all tiles of its span; -1 for separators, padding.

    grid: int64 (S, N, 4), (tile, t, h, w). frames: the number of frames of each tile of each span; empty where unknown.
    """
    widest = max((len(f) for f in frames), default=0) or 1
    before = [[sum(f[:i]) if i < len(f) else 0 for i in range(widest)] for f in frames]
    tile, t = grid[..., 0], grid[..., 1]
    offset = on_device(before, grid).gather(1, tile.clamp(min=0, max=widest - 1))
    return torch.where(t < 0, -1, t + offset)


def same_place(grid: Tensor, frame: Tensor, reference: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return int64 (S, N), the index of the token at the same (h, w) in the frame `reference`; -1 where there is none.

    grid: int64 (S, N, 4), -1 for separators, which stand at no place. frame, reference: int64 (S, N), -1 for none.
    shape: host numbers (frames, height, width) that bound them.
    """
    frames, height, width = shape
    cells = frames * height * width
    cell = grid[..., 2].clamp(min=0) * width + grid[..., 3].clamp(min=0)
    nowhere = grid[..., 2] < 0
    frame, reference = frame.masked_fill(nowhere, -1), reference.masked_fill(nowhere, -1)
    index = torch.arange(grid.shape[1], device=grid.device)[None].expand_as(frame)
    table = torch.full((grid.shape[0], cells + 1), -1, dtype=torch.int64, device=grid.device)
    table = table.scatter(1, torch.where(frame < 0, cells, frame * height * width + cell), index)
    found = table.gather(1, torch.where(reference < 0, cells, reference * height * width + cell))
    return torch.where(reference < 0, -1, found)
