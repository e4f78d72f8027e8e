"""Whole numbers of tokens shared over groups, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .select import ranks


@selection
def share_out(total: Tensor, weights: Tensor) -> Tensor:
    """Return int64 (S, G) that sum to `total`, in proportion to the weights, by largest remainder; ties: first group.

    total: int64 (S,). weights: (S, G), not negative; a row of zeros gets nothing.
    """
    weights = weights.double()
    exact = total[:, None] * weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    # What is a whole number but for rounding is one.
    exact = torch.where((exact - exact.round()).abs() < 1e-9, exact.round(), exact)
    floor = exact.floor()
    left = torch.where(weights.sum(1) > 0, total - floor.sum(1).long(), 0)
    return floor.long() + (ranks(exact - floor, weights > 0) < left[:, None])
