"""The crops of a tiled picture beside its overview."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .select import local_index
from .share import share_of, share_out


@selection
def crop_shown(grid: Tensor, overview: Tensor, forms: Tensor, by_list: bool) -> Tensor:
    """Return int64 (S, N), the number from 1 of the crop that shows what a token of the overview shows, 0 for others.

    grid: int64 (S, N, 4), tile, frame, row and column. overview: bool (S, N). forms: int64 (S, 4), rows and columns of
    crops, rows and columns of the overview, zeros where there are none. by_list: cut the overview's tokens, in order,
    into as many equal pieces instead.
    """
    high, across, rows, columns = (number[:, None] for number in forms.unbind(1))
    if by_list:
        crop = local_index(overview) * (high * across) // (rows * columns).clamp(min=1)
    else:
        row, column = grid[..., 2] * high // rows.clamp(min=1), grid[..., 3] * across // columns.clamp(min=1)
        crop = row * across + column
    return torch.where(overview & (grid[..., 2] >= 0) & (high > 0), crop + 1, 0)


@selection
def overview_split(budget: Tensor, size: Tensor, weight: Tensor, share: float, exact: bool) -> Tensor:
    """Return int64 (S, G), a share of the budget for the first group, the rest for the others by weight.

    budget: int64 (S,). size: int64 (S, G), what a group keeps at most. weight: (S, G), 0 for the first group. exact:
    what rounding and full groups leave goes to the others, by size; else it is lost.
    """
    # What is rounded down must leave one token at least.
    first = torch.minimum(share_of(budget, share, down=True).clamp(min=int(not exact)), size[:, 0])
    rest = torch.minimum(budget - first, size[:, 1:].sum(1))
    first = torch.minimum(budget - rest, size[:, 0]) if exact else first
    if not exact:
        part = weight.double() / weight.sum(1, keepdim=True).clamp(min=1)
        counts = (part * rest[:, None]).long().minimum(size)
    else:
        counts = share_out(rest, weight).minimum(size)
        room = size - counts
        room[:, 0] = 0
        counts = counts + share_out(rest - counts.sum(1), room)
    counts[:, 0] = first
    return counts
