"""Tokens that take up what lies around them on the grid and is like them."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import cosine, unit
from .select import compact_indices, positions, take

Entries = tuple[Tensor, Tensor, Tensor, Tensor]


@selection
def surrounding_entries(
    x: Tensor, grid: Tensor, label: Tensor, keep: Tensor, weak: Tensor, radius: Tensor, slots: int, added: bool
) -> Entries:
    """Return (span, into, source, weight), each (E,): a weak survivor takes up all tokens around it, others stay.

    Token j counts max(0, cosine) * max(0, 1 - distance / radius) for survivor i, of all tokens of its group and frame;
    these weights are divided by their sum. x: (S, N, d). grid: int64 (S, N, 4), (tile, t, h, w). label: int64 (S, N),
    -1 for tokens that do not count. keep, weak: bool (S, N). radius: float32 (S, N), in cells. slots: host number, at
    least the most survivors of a span. added: a survivor counts as 1 itself, whatever its weight is.
    """
    index, filled = compact_indices(keep, slots)
    x = unit(x.masked_fill((label < 0)[..., None], 0))
    alike = cosine(take(x, index), x, normed=True).clamp(min=0)
    near = 1 - _distances(grid, index) / take(radius, index)[..., None]
    frame = torch.cat([label[..., None], grid[..., :2]], 2)
    same = (take(frame, index)[:, :, None] == frame[:, None]).all(3) & (label >= 0)[:, None]
    weight = (alike * near.clamp(min=0)).masked_fill(~same, 0)
    weight = weight / (weight.sum(2, keepdim=True) + 1e-8)
    itself = positions(label)[:, None] == index[..., None]
    weight = weight.masked_fill(itself, 1) if added else weight
    weight = torch.where(take(weak, index)[..., None], weight, itself.float())
    weight = weight.masked_fill(~filled[..., None], 0)
    source = positions(label)[:, None].expand_as(weight)
    span = torch.arange(len(x), device=x.device)[:, None, None].expand_as(source)
    return span.flatten(), index[..., None].expand_as(source).flatten(), source.flatten(), weight.flatten()


def _distances(grid: Tensor, index: Tensor) -> Tensor:
    """Return float32 (S, K, N), the distance on the grid from each chosen token to all."""
    place = grid[..., 2:].float()
    return torch.linalg.vector_norm(take(place, index)[:, :, None] - place[:, None], dim=-1)
