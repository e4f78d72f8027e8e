"""How many scores of a group stand out."""

from __future__ import annotations

from collections.abc import Sequence

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
    low, high = group_quantiles(score, label.masked_fill(~there, -1), count, (0.25, 0.75))
    bar = (high + factor * (high - low)).gather(1, label.clamp(min=0))
    above = there & (score > bar)
    return torch.zeros_like(high, dtype=torch.int64).scatter_add(1, label.clamp(min=0), above.long())


@selection
def group_quantiles(score: Tensor, label: Tensor, count: int, shares: Sequence[float]) -> tuple[Tensor, ...]:
    """Return float64 (S, G) for each share, the score below which that share of a group lies, interpolated linearly.

    score: (S, N), finite where it counts. label: int64 (S, N), from 0 to count - 1, -1 for what takes no part.
    """
    score = score.detach().double()
    there = label >= 0
    group = torch.where(there, label, count)
    first = score.masked_fill(~there, torch.inf).argsort(dim=1, stable=True)
    second = group.gather(1, first).argsort(dim=1, stable=True)
    ascending = score.masked_fill(~there, 0).gather(1, first.gather(1, second))
    size = torch.zeros(len(label), count + 1, dtype=torch.int64, device=label.device)
    size = size.scatter_add(1, group, torch.ones_like(group))[:, :count]
    begin = size.cumsum(1) - size
    return tuple(_quantile(ascending, begin, size, share) for share in shares)


def _quantile(ascending: Tensor, begin: Tensor, size: Tensor, share: float) -> Tensor:
    """Return (S, G), a quantile of each run of `ascending` (S, N) that begins at `begin` and is `size` long."""
    # Where a share of a length should be a whole number, it is not to miss that by rounding.
    place = ((size - 1).clamp(min=0).double() * share * 1e6).round() / 1e6
    whole = place.floor().long()
    last = ascending.shape[1] - 1
    lower = ascending.gather(1, (begin + whole).clamp(max=last))
    upper = ascending.gather(1, (begin + (whole + 1).minimum((size - 1).clamp(min=0))).clamp(max=last))
    return lower + (upper - lower) * (place - whole)
