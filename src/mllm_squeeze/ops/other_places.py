"""The best tokens of a group, places of the grid that are taken coming last."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .select import rank_within, ranks


@selection
def other_places(scores: Tensor, place: Tensor, label: Tensor, count: int, limit: Tensor) -> Tensor:
    """Return bool (S, N), so many tokens of each group: the best of each place by score, then the second of each, ...

    scores: (S, N). place: int64 (S, N), from 0 on; -1 for tokens of no place, which come as if each had its own. label:
    int64 (S, N), from 0 to count - 1, -1 for none. limit: int64 (S, count). Ties take the lowest index.
    """
    mask, width = label >= 0, label.shape[1]
    own = place.amax() + 1 + torch.arange(width, device=place.device)
    where = torch.where(place < 0, own, place) * count + label.clamp(min=0)
    turn = rank_within(scores, where, mask)
    # Whole numbers up to the square of the width: exact in float64.
    order = turn.double() * (width + 1) + ranks(scores, mask)
    return mask & (rank_within(-order, label, mask) < limit.gather(1, label.clamp(min=0)))
