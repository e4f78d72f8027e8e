"""Which tokens stand beside others on the grid of their group."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection


@selection
def beside_on_grid(chosen: Tensor, grid: Tensor, label: Tensor, count: int, slots: int, wraps: bool) -> Tensor:
    """Return bool (S, N), the tokens that stand left, right, above or below of a chosen one, in its group and frame.

    chosen: bool (S, N). grid: int64 (S, N, 4), tile, frame, row and column, -1 for what has no place. label: int64
    (S, N), -1 for tokens of no group. count: of groups. slots: host number, at least the cells of the largest group.
    wraps: cells are numbered row by row, the neighbours of n are n - 1, n + 1, n - width and n + width, and what would
    lie outside is the first or the last cell: a neighbour may stand at the other end of the next row, or be none.
    """
    _, frame, row, column = grid.unbind(-1)
    inside = (label >= 0) & (row >= 0)
    group = torch.where(inside, label, count)
    top, left = (_extreme(x, group, count, "amin") for x in (row, column))
    bottom, right = (_extreme(x, group, count, "amax") for x in (row, column))
    high, width = bottom - top + 1, right - left + 1
    row, column = row - top, column - left
    cell = (frame * high + row) * width + column
    table = torch.zeros(len(label), (count + 1) * slots, dtype=torch.bool, device=label.device)
    base = group * slots
    here = base + cell.clamp(min=0, max=slots - 1)
    # What has no place writes to a group of its own.
    table = table.scatter(1, torch.where(inside, here, count * slots), chosen & inside)
    table[:, count * slots :] = False
    last = _extreme(cell, group, count, "amax")

    def at(step: Tensor, there: Tensor) -> Tensor:
        other = cell + step
        there = there & inside & (other >= 0) & (other <= last)
        return table.gather(1, base + other.clamp(min=0, max=slots - 1)) & there

    one, everywhere = torch.ones_like(width), torch.ones_like(inside)
    if not wraps:
        open_ = (column > 0, column < width - 1, row > 0, row < high - 1)
        steps = zip((-one, one, -width, width), open_, strict=True)
        found = [at(step, there) for step, there in steps]
        return found[0] | found[1] | found[2] | found[3]
    found = [at(step, everywhere) for step in (-one, one, -width, width)]
    # The first row has nothing above, the last one nothing below: their neighbours there are the first and last cell.
    first_row, last_row = cell < width, cell > last - width
    above, below = (_any_in_group(chosen & inside & edge, group, count) for edge in (first_row, last_row))
    corner = (above & (cell == 0)) | (below & (cell == last))
    return found[0] | found[1] | found[2] | found[3] | (corner & inside)


def _extreme(x: Tensor, group: Tensor, count: int, how: str) -> Tensor:
    """Return (S, N), the smallest ("amin") or largest number of the group of each token."""
    out = x.new_zeros(len(x), count + 1).scatter_reduce(1, group, x, how, include_self=False)
    return out.gather(1, group)


def _any_in_group(flag: Tensor, group: Tensor, count: int) -> Tensor:
    out = torch.zeros(len(flag), count + 1, dtype=torch.long, device=flag.device)
    return out.scatter_add(1, group, flag.long()).gather(1, group) > 0
