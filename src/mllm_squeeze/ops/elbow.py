"""Where a falling curve of scores bends."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .select import rank_within


@selection
def above_elbow(score: Tensor, label: Tensor, count: int) -> Tensor:
    """Return int64 (S, G), how many scores of each group are above the one at the bend of their falling curve.

    The bend is the point farthest from the line through the first and the last one, the first of several. At least one
    of each group that holds tokens. score: (S, N), -inf takes no part. label: int64 (S, N), from 0 to count - 1, -1 for
    none.
    """
    score = score.detach().double()
    there = (label >= 0) & score.isfinite()
    group = torch.where(there, label, count)
    value = score.masked_fill(~there, 0)
    rank = rank_within(value, group, there).clamp(max=score.shape[1] - 1)
    size = torch.zeros(len(label), count + 1, dtype=torch.long, device=label.device).scatter_add(1, group, there.long())
    highest, lowest = (_extreme(value, group, there, count, how) for how in ("amax", "amin"))
    last = (size - 1).clamp(min=0).gather(1, group)
    high, low = highest.gather(1, group), lowest.gather(1, group)
    far = (last * (high - value) + rank * (low - high)).abs().masked_fill(~there, -1)
    farthest = _extreme(far, group, there, count, "amax").gather(1, group)
    # What rounding alone tells apart is as far.
    bends = there & (far >= farthest * (1 - 1e-12))
    first = torch.where(bends, rank, score.shape[1])
    first = torch.full_like(size, score.shape[1]).scatter_reduce(1, group, first, "amin").gather(1, group)
    at = _extreme(value.masked_fill(~(there & (rank == first)), -torch.inf), group, there, count, "amax").gather(
        1, group
    )
    found = torch.zeros_like(size).scatter_add(1, group, (there & (value > at)).long())[:, :count]
    held = torch.zeros_like(size).scatter_add(1, torch.where(label >= 0, label, count), (label >= 0).long())[:, :count]
    return found.clamp(min=1).minimum(held)


def _extreme(x: Tensor, group: Tensor, there: Tensor, count: int, how: str) -> Tensor:
    """Return (S, count + 1), the largest ("amax") or smallest number of each group."""
    none = -torch.inf if how == "amax" else torch.inf
    out = torch.full((len(x), count + 1), none, dtype=x.dtype, device=x.device)
    return out.scatter_reduce(1, group, x.masked_fill(~there, none), how)
