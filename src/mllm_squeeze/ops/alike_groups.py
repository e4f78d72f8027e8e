"""Groups whose tokens are all alike, and how many tokens they can do without."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import unit
from .segment import segment_count, segment_sum


@selection
def group_likeness(x: Tensor, label: Tensor, count: int) -> Tensor:
    """Return float32 (S, G), the mean cosine of all pairs of different tokens of a group; -1 with fewer than two.

    x: (S, N, d). label: int64 (S, N), from 0 to count - 1, -1 for none.
    """
    size = segment_count(label, count)
    square = segment_sum(unit(x.masked_fill((label < 0)[..., None], 0)), label, count).square().sum(-1)
    pairs = (size * (size - 1)).clamp(min=1)
    return ((square - size) / pairs).masked_fill(size < 2, -1)


@selection
def without_the_alike(likeness: Tensor, size: Tensor, budget: Tensor) -> Tensor:
    """Return int64 (S, G), how many tokens each group keeps so that all together are the budget.

    The most alike are left with one token first; where one of each is too many, they lose that too, in the same order.
    likeness: float32 (S, G). size: int64 (S, G). budget: int64 (S,).
    """
    order = likeness.masked_fill(size == 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    sizes = size.gather(1, order)
    rest = (size.sum(1) - budget).clamp(min=0)[:, None]
    taken = torch.zeros_like(sizes)
    for spare in ((sizes - 1).clamp(min=0), (sizes > 0).long()):
        before = spare.cumsum(1) - spare
        now = (rest - before).clamp(min=0).minimum(spare)
        taken, rest = taken + now, rest - now.sum(1, keepdim=True)
    return torch.empty_like(size).scatter_(1, order, sizes - taken)
