"""Pairs of tokens that are linked, and what hangs together by them."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection


@selection
def linked_first(first: Tensor, second: Tensor, count: int, whole: bool = True) -> Tensor:
    """Return int64 (count,), for each token the lowest of those that it is linked with by way of pairs, or itself.

    Round by round both of a pair take the lower of what they stand for, and each then what that stands for. whole: the
    rounds end when nothing changes; else as soon as what stands for others stands for itself, so that a token that is
    linked with two others may take only one of them along. first, second: int64 (E,), the pairs. It waits for the
    device once per round.
    """
    lowest = torch.arange(count, device=first.device)
    while True:
        before = lowest
        least = lowest[first].minimum(lowest[second])
        lowest = lowest.scatter_reduce(0, first, least, "amin").scatter_reduce(0, second, least, "amin")
        lowest = lowest[lowest]
        if torch.equal(lowest[lowest], lowest) if not whole else torch.equal(lowest, before):
            return lowest
