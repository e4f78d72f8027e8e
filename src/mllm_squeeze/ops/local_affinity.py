"""How like its neighbours on the grid a token is, and how near they are."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection

_BESIDE = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]


@selection
def local_affinity(
    x: Tensor, grid: Tensor, frame: Tensor, shape: tuple[int, int, int], place_weight: float = 0.5
) -> Tensor:
    """Return float64 (S, N), the mean affinity of a token to the nine cells around it, its own among them.

    To a neighbour it is -|x - y|^2 / v - place_weight * |p - q|^2 / u, p and q the places on the grid, v and u the
    variances of all numbers of x, and of all rows and columns, over the span; 0 to itself and to what is not there.
    Where nothing varies the term is 0. x: (S, N, D). grid: int64 (S, N, 4). frame: int64 (S, N), the frame of each
    token counted through the tiles of its span, -1 for what has no place. shape: host numbers (frames, rows, columns)
    that bound them.
    """
    there = frame >= 0
    x = x.double().masked_fill(~there[..., None], 0)
    place = grid[..., 2:].double().masked_fill(~there[..., None], 0)
    states, places = (_per_variance(one, there) for one in (x, place))
    frames, rows, columns = shape
    total = torch.zeros(frame.shape, dtype=torch.float64, device=frame.device)
    for down, right in _BESIDE:
        row, column = grid[..., 2] + down, grid[..., 3] + right
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        other = _moved(grid, frame, (frames, rows, columns), down, right).masked_fill(~inside | ~there, -1)
        far = (x - x.gather(1, other.clamp(min=0)[..., None].expand_as(x))).square().sum(-1)
        affinity = -far * states - place_weight * (down * down + right * right) * places
        total = total + affinity.masked_fill(other < 0, 0)
    return total / 9


def _moved(grid: Tensor, frame: Tensor, shape: tuple[int, int, int], down: int, right: int) -> Tensor:
    """Return int64 (S, N), the token that stands so many cells from each in its frame, -1 where there is none."""
    frames, rows, columns = shape
    cells = frames * rows * columns
    cell = (frame * rows + grid[..., 2]) * columns + grid[..., 3]
    index = torch.arange(grid.shape[1], device=grid.device)[None].expand_as(frame)
    table = torch.full((len(grid), cells + 1), -1, dtype=torch.int64, device=grid.device)
    table = table.scatter(1, torch.where(frame < 0, cells, cell), index)
    return table.gather(1, (cell + down * columns + right).clamp(min=0, max=cells - 1))


def _per_variance(x: Tensor, there: Tensor) -> Tensor:
    """Return float64 (S, 1), 1 / variance of all numbers of x (S, N, D) at True tokens, 0 where they do not vary."""
    count = (there.sum(1) * x.shape[-1]).clamp(min=2)[:, None]
    off = (x - x.sum((1, 2), keepdim=True) / count[..., None]).masked_fill(~there[..., None], 0)
    variance = off.square().sum((1, 2))[:, None] / (count - 1)
    return torch.where(variance > 0, 1 / variance.where(variance > 0, 1), 0)
