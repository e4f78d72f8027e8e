"""Cells of a grid that are as far from each other as can be."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=64)
def spread_cells(height: int, width: int, count: int) -> tuple[int, ...]:
    """Return so many cells of a grid, in raster numbers and in the order in which they are picked.

    The first cell begins; each further one is the farthest from those picked, by rows plus columns; ties take the
    lowest number. arXiv 2505.22038.
    """
    cell = torch.arange(height * width)
    row, column = cell // width, cell % width
    picks, distance = [0], row + column
    while len(picks) < min(count, height * width):
        pick = int(distance.argmax())
        picks.append(pick)
        distance = distance.minimum((row - row[pick]).abs() + (column - column[pick]).abs())
    return tuple(picks[:count])
