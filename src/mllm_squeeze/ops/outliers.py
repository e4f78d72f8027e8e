"""How many scores of a group stand out."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection


@selection
def outlier_counts(score: Tensor, label: Tensor, count: int, factor: float) -> Tensor:
    """Return int64 (S, G), how many scores of each group are above its third quartile plus `factor` quartile distances.

    Quartiles are interpolated linearly. score: (S, N); what is not finite takes no part. label: int64 (S, N), from 0 to
    count - 1, -1 for none.
    """
    score = score.detach().double()
    there = (label >= 0) & score.isfinite()
    group = torch.where(there, label, count)
    first = score.masked_fill(~there, torch.inf).argsort(dim=1, stable=True)
    second = group.gather(1, first).argsort(dim=1, stable=True)
    ascending = score.masked_fill(~there, 0).gather(1, first.gather(1, second))
    size = torch.zeros(len(label), count + 1, dtype=torch.int64, device=label.device)
    size = size.scatter_add(1, group, torch.ones_like(group))[:, :count]
    begin = size.cumsum(1) - size
    low, high = (_quantile(ascending, begin, size, share) for share in (0.25, 0.75))
    bar = torch.nn.functional.pad(high + factor * (high - low), (0, 1)).gather(1, group)
    above = there & (score > bar)
    return torch.zeros_like(size).scatter_add(1, label.clamp(min=0), above.long())


def _quantile(ascending: Tensor, begin: Tensor, size: Tensor, share: float) -> Tensor:
    """Return (S, G), a quantile of each run of `ascending` (S, N) that begins at `begin` and is `size` long."""
    place = (size - 1).clamp(min=0) * share
    whole = place.floor().long()
    last = ascending.shape[1] - 1
    lower = ascending.gather(1, (begin + whole).clamp(max=last))
    upper = ascending.gather(1, (begin + (whole + 1).minimum((size - 1).clamp(min=0))).clamp(max=last))
    return lower + (upper - lower) * (place - whole)
