"""Squares within squares on a grid: the largest ones whose parts are all alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import at_least_float32, on_device, selection
from .score import unit


@dataclass(frozen=True)
class QuadtreeLevel:
    """Squares of one size, in all frames: h rows and w columns of them.

    mean: float32 (T, h, w, D), the mean of the four squares that a square is made of, of one or two at an edge.
    alike: float32 (T, h, w), the smallest cosine between a square and those that it is made of, 1 for single cells.
    row, column: for each row of cells, and each column, the number of the square that holds it.
    row_share, column_share: what each row, and each column, counts in the mean of its square.
    """

    mean: Tensor
    alike: Tensor
    row: list[int]
    column: list[int]
    row_share: list[float]
    column_share: list[float]


def _halved(side: int) -> list[int]:
    """Return for each of `side` rows where it goes as they are joined in twos; of an odd number the first is alone."""
    return [(n + side % 2) // 2 for n in range(side)]


def quadtree_sides(height: int, width: int, skip: int) -> list[tuple[int, int]]:
    """Return rows and columns of squares, finest first, until two are left of either; without the `skip` last ones."""
    sides = [(height, width)]
    while min(sides[-1]) > 2:
        sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
    return sides[: max(1, len(sides) - skip)]


@selection
def quadtree_levels(x: Tensor, skip: int) -> list[QuadtreeLevel]:
    """Return the levels of a quadtree over each frame, single cells first. x: (T, H, W, D).

    skip: how many of the coarsest levels are left out, as long as there is one.
    """
    mean = at_least_float32(x)
    height, width = mean.shape[1:3]
    level = QuadtreeLevel(
        mean, torch.ones_like(mean[..., 0]), [*range(height)], [*range(width)], [1.0] * height, [1.0] * width
    )
    levels = [level]
    for side in quadtree_sides(height, width, skip)[:-1]:
        level = _coarser(level, _halved(side[0]), _halved(side[1]))
        levels.append(level)
    return levels


def _coarser(level: QuadtreeLevel, down: list[int], right: list[int]) -> QuadtreeLevel:
    """Return the level of larger squares; down, right: where each row and column of squares goes."""
    rows, columns = _ends(down, level.mean), _ends(right, level.mean)
    mean = level.mean
    for axis, (first, last) in ((1, rows), (2, columns)):
        mean = (mean.index_select(axis, first) + mean.index_select(axis, last)) / 2
    over = mean.index_select(1, on_device(down, mean)).index_select(2, on_device(right, mean))
    alike = (unit(over) * unit(level.mean)).sum(-1)
    for axis, (first, last) in ((1, rows), (2, columns)):
        alike = alike.index_select(axis, first).minimum(alike.index_select(axis, last))
    return QuadtreeLevel(
        mean,
        alike,
        [down[n] for n in level.row],
        [right[n] for n in level.column],
        [share / down.count(down[n]) for share, n in zip(level.row_share, level.row, strict=True)],
        [share / right.count(right[n]) for share, n in zip(level.column_share, level.column, strict=True)],
    )


def _ends(into: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last of the rows that go into each."""
    first = [into.index(n) for n in range(into[-1] + 1)]
    return on_device(first, like), on_device([n - 1 for n in first[1:]] + [len(into) - 1], like)


def quadtree_squares(levels: Sequence[QuadtreeLevel], above: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (first, weight, mean) of each cell: int64 (T, P), float32 (T, P), float32 (T, P, D), P = H * W.

    From the coarsest level down a square stays whole if its smallest cosine to what it is made of is not below a
    number; single cells always do. first: the first cell of the square that a cell is in. weight: what the cell counts
    in the mean of its square. mean: that mean.
    """
    first, weight, mean, _ = _of_cells(levels[0])
    for level in levels[1:]:
        # A larger square takes all cells of the smaller ones in it.
        own_first, own_weight, own_mean, alike = _of_cells(level)
        whole = alike >= above
        first, weight = own_first.where(whole, first), own_weight.where(whole, weight)
        mean = own_mean.where(whole[..., None], mean)
    return first, weight, mean


def _of_cells(level: QuadtreeLevel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return first, weight and mean of the squares that cells are in, as above, and how alike their parts are."""
    mean = level.mean
    frames, _, wide, _ = mean.shape
    top = on_device([level.row.index(n) for n in level.row], mean)
    left = on_device([level.column.index(n) for n in level.column], mean)
    first = (top[:, None] * len(level.column) + left).flatten()
    shares = [on_device(torch.tensor(share), mean) for share in (level.row_share, level.column_share)]
    weight = (shares[0][:, None] * shares[1]).flatten()
    square = (on_device(level.row, mean)[:, None] * wide + on_device(level.column, mean)).flatten()
    return (
        first.expand(frames, -1),
        weight.expand(frames, -1),
        mean.flatten(1, 2).index_select(1, square),
        level.alike.flatten(1).index_select(1, square),
    )
