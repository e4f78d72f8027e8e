"""A grid of tokens on a smaller grid, by a matrix for its rows and one for its columns."""

from __future__ import annotations

import functools
import math
from typing import Literal, Protocol

import torch
from torch import Tensor

Filter = Literal["dct", "linear"]


class _Rectangle(Protocol):
    """A rectangle of tokens, frames x height x width."""

    @property
    def frames(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def cells(self) -> int: ...


@functools.lru_cache(maxsize=64)
def resampling(size: int, smaller: int, how: Filter) -> Tensor:
    """Return float64 (smaller, size), the weights of the cells of a line in those of a shorter one; rows sum to 1.

    how: "dct" keeps the lowest frequencies of a cosine transform (DCT-II, orthonormal) and goes back on the shorter
    line, scaled so that a constant stays what it is; "linear" interpolates between the two nearest centres.
    """
    if how == "linear":
        line = torch.eye(size, dtype=torch.float64)[None]
        return torch.nn.functional.interpolate(line, size=smaller, mode="linear", align_corners=False)[0].T.contiguous()
    low = _cosines(smaller).T @ _cosines(size)[:smaller]
    return low * math.sqrt(smaller / size)


def _cosines(size: int) -> Tensor:
    """Return float64 (size, size), the orthonormal DCT-II: row k holds frequency k."""
    place = torch.arange(size, dtype=torch.float64)
    table = torch.cos(math.pi * (2 * place + 1) * place[:, None] / (2 * size)) * math.sqrt(2 / size)
    table[0] = math.sqrt(1 / size)
    return table


@functools.lru_cache(maxsize=64)
def resampled_cells(
    tiles: tuple[_Rectangle, ...], sizes: tuple[tuple[int, int], ...], how: Filter
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (into, source, weight), each (E,) on the CPU: which cells of a span's tiles make those of smaller grids.

    Cells are numbered tile by tile, frame by frame, in raster order; a cell of the smaller grid (height, width) of
    `sizes` stands at the first cell of its window. into, source: int64. weight: float32, without zeros.
    """
    found, before = [], 0
    for tile, (high, wide) in zip(tiles, sizes, strict=True):
        weight = torch.kron(resampling(tile.height, high, how), resampling(tile.width, wide, how)).float()
        rows, columns = (-(-torch.arange(n) * side // n) for n, side in ((high, tile.height), (wide, tile.width)))
        first = (rows[:, None] * tile.width + columns).flatten()
        into, source = (weight.abs() > 1e-7).nonzero(as_tuple=True)
        area = tile.height * tile.width
        for frame in range(tile.frames):
            start = before + frame * area
            found.append((start + first[into], start + source, weight[into, source]))
        before += tile.cells
    return tuple(torch.cat(part) for part in zip(*found, strict=True))  # type: ignore[return-value]
