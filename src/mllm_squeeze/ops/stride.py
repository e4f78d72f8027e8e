"""Evenly spread choices: the 1-D rule on any list of tokens, the 2-D rule on a grid, and the size of a pooled grid."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .select import local_index


def stride_mask(mask: Tensor, k: Tensor) -> Tensor:
    """Return bool (S, N), the tokens floor(i * n / k), i < k, of the n True ones of each span; all where k >= n.

    k: int64 (S,).
    """
    place = local_index(mask)
    n, k = mask.sum(1, keepdim=True), k[:, None].clamp(min=1)
    # The smallest i with i * n / k >= place is the only one that can land on it, because the step is at least 1.
    i = (place * k + n - 1).div(n.clamp(min=1), rounding_mode="floor")
    landed = (i * n).div(k, rounding_mode="floor") == place
    return mask & (landed | (k >= n))


def whole_stride_mask(mask: Tensor, k: Tensor) -> Tensor:
    """Return bool (S, N), every floor(n / k)-th of the n True tokens of each span, the first k of them; all if k >= n.

    k: int64 (S,).
    """
    step = mask.sum(1).div(k.clamp(min=1), rounding_mode="floor").clamp(min=1)[:, None]
    place = local_index(mask)
    return mask & (place % step == 0) & (place < step * k[:, None])


@functools.lru_cache(maxsize=256)
def grid_size(height: int, width: int, cells: int) -> tuple[int, int]:
    """Return the (h, w) within height x width, h * w <= cells, of closest aspect; the larger, then lower h, on ties."""
    best = (math.inf, 0, 0)
    size = (1, 1)
    for h in range(1, min(height, max(cells, 1)) + 1):
        w = max(1, min(width, cells // h))
        bent = abs(math.log(h * width / (w * height)))
        if (round(bent, 9), -h * w, h) < best:
            best, size = (round(bent, 9), -h * w, h), (h, w)
    return size


@functools.lru_cache(maxsize=256)
def pooled_size(height: int, width: int, cells: int) -> tuple[int, int]:
    """Return the (h, w) within height x width, h * w <= max(cells, 1), that fills `cells` best at nearly its aspect.

    It maximises h * w / sqrt(bend), where bend >= 1 is how much the aspect changes; the less bent, then lower h, on
    ties.
    """
    best = (-math.inf, -math.inf, 0)
    size = (1, 1)
    for h in range(1, min(height, max(cells, 1)) + 1):
        for w in range(1, min(width, max(cells, 1) // h) + 1):
            bend = math.exp(abs(math.log(h * width / (w * height))))
            rank = (round(h * w / math.sqrt(bend), 9), -round(bend, 9), -h)
            if rank > best:
                best, size = rank, (h, w)
    return size


def _centred(length: int, count: int) -> Tensor:
    """Return bool (length,), True at floor((i + 0.5) * length / count), i < count."""
    picked = torch.zeros(length, dtype=torch.bool)
    picked[(2 * torch.arange(count) + 1) * length // (2 * count)] = True
    return picked


def _frame_pattern(height: int, width: int, k: int) -> Tensor:
    """Return bool (height * width,) with k True: a centred grid, the rest spread over the cells that it leaves."""
    if k == 0:
        return torch.zeros(height * width, dtype=torch.bool)
    h, w = grid_size(height, width, k)
    picked = (_centred(height, h)[:, None] & _centred(width, w)).flatten()
    left = k - h * w
    if left:
        picked = picked | stride_mask(~picked[None], torch.tensor([left]))[0]
    return picked


@functools.lru_cache(maxsize=64)
def grid_pattern(frames: int, height: int, width: int, k: int) -> Tensor:
    """Return bool (frames * height * width,) on the CPU with min(k, all) True, even over frames, rows and columns.

    Frame t gets floor((t + 1) * k / frames) - floor(t * k / frames) tokens. The result is shared: do not write to it.
    """
    k = min(k, frames * height * width)
    shares = [(t + 1) * k // frames - t * k // frames for t in range(frames)]
    patterns = {share: _frame_pattern(height, width, share) for share in set(shares)}
    return torch.cat([patterns[share] for share in shares])
