"""The table of all visual tokens of a prompt, which follows them through the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm_squeeze import ops
from mllm_squeeze.layout import Tile, TokenLayout


@dataclass(frozen=True)
class SpanTable:
    """The visual tokens of all spans, padded to the longest, as they stand in the sequence now.

    sample: int64 (S,). place: int64 (S, N), column in the sequence of now. mask: bool (S, N). origin: int64 (S, N),
    place in the span before any cut. grid: int64 (S, N, 4). current: tokens per span, on the host. size: float32
    (S, N), how many tokens each one stands for by now; None while nothing was merged, or nobody asks.
    """

    sample: Tensor
    place: Tensor
    mask: Tensor
    origin: Tensor
    grid: Tensor
    current: tuple[int, ...]
    size: Tensor | None = None

    def rows(self, rows: Sequence[int]) -> SpanTable:
        """Return the table of some spans."""
        pick = ops.on_device(rows, self.sample)
        return SpanTable(
            self.sample[pick],
            self.place[pick],
            self.mask[pick],
            self.origin[pick],
            self.grid[pick],
            tuple(self.current[n] for n in rows),
            None if self.size is None else self.size[pick],
        )

    def take(self, chosen: Tensor, current: tuple[int, ...], place: Tensor) -> SpanTable:
        """Keep the chosen tokens (bool (S, N)) in order; `place` are the columns they have now."""
        width = max(current, default=0)
        order = (~(chosen & self.mask)).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        mask = (chosen & self.mask).gather(1, order)
        return SpanTable(
            self.sample,
            place.gather(1, order),
            mask,
            self.origin.gather(1, order),
            self.grid.gather(1, order[..., None].expand(-1, -1, 4)),
            current,
            None if self.size is None else self.size.gather(1, order),
        )

    def order(self, chosen: Tensor, width: int) -> Tensor:
        """Return int64 (S, width): the chosen tokens first, in order."""
        return (~(chosen & self.mask)).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]


def first_table(layout: TokenLayout, device: torch.device) -> SpanTable:
    """Return the table of all visual tokens of a prompt; tokens stand at their columns."""
    current = tuple(span.length for span in layout.spans)
    origin = torch.arange(max(current)).expand(len(current), -1)
    mask = origin < torch.tensor(current)[:, None]
    place = torch.zeros_like(origin)
    place[mask] = _columns([run for span in layout.spans for run in span.runs])
    if any(span.origin is not None for span in layout.spans):
        origin = origin.clone()
        for row, span in enumerate(layout.spans):
            if span.origin is not None:
                origin[row, : span.length] = torch.tensor(span.origin)
    grid = torch.full((*mask.shape, 4), -1)
    for tiles in {span.tiles for span in layout.spans if span.tiles}:
        cells = torch.cat([_cells(n, tile) for n, tile in enumerate(tiles)])
        grid[[span.tiles == tiles for span in layout.spans], : len(cells)] = cells
    sample = torch.tensor([span.sample for span in layout.spans])
    # Unasked, each copy would wait for the encoder.
    parts = (part.to(device, non_blocking=True) for part in (sample, place, mask, origin, grid))
    sample, place, mask, origin, grid = parts
    return SpanTable(sample, place, mask, origin, grid, current)


def _columns(runs: Sequence[tuple[int, int]]) -> Tensor:
    """Return int64 (P,), the columns of some runs, one after the other."""
    start, length = torch.tensor(runs).unbind(1)
    before = length.cumsum(0) - length
    return torch.arange(int(length.sum())) + (start - before).repeat_interleave(length)


def _cells(number: int, tile: Tile) -> Tensor:
    """Return int64 (N, 4): tile, frame, row and column of each token of a tile, -1 for separators."""
    cells = torch.full((tile.length, 4), -1)
    frames = cells[: tile.length - tile.tail].unflatten(0, (tile.frames, -1))[:, tile.frame_lead :]
    inside = frames.unflatten(1, (tile.height, -1))[:, :, : tile.width]
    inside[..., 0] = number
    inside[..., 1] = torch.arange(tile.frames)[:, None, None]
    inside[..., 2] = torch.arange(tile.height)[:, None]
    inside[..., 3] = torch.arange(tile.width)
    return cells
