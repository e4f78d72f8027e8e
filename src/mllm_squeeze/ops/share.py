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


def share_of(total: Tensor, share: float, down: bool = False) -> Tensor:
    """Return int64, the share of each whole number, half rounded up, blind to float noise below a billionth.

    total: int64, any shape. share: in [0, 1]. down: whether it is rounded down instead.
    """
    # In whole billionths, because a device may know no float64.
    return (total * round(share * 10**9) + _before_floor(down)).div(10**9, rounding_mode="floor")


def share_of_count(total: int, share: float, down: bool = False) -> int:
    """Return `share_of` one number, on the host."""
    return (total * round(share * 10**9) + _before_floor(down)) // 10**9


def _before_floor(down: bool) -> int:
    # A share like 1 / 3 falls short of a whole number by less than half a billionth per token.
    return 10**5 if down else 5 * 10**8


@selection
def untypical_share(uniqueness: Tensor, size: Tensor, budget: Tensor, temperature: float) -> Tensor:
    """Return int64 (S, G), tokens to keep in each group: about the mean share, more where uniqueness is larger.

    The mean share is scaled by 1 + p - 1 / G with p the softmax of uniqueness / temperature over the groups that hold
    tokens: at most the whole group, at least one token, half to even. The sum may miss the budget by rounding; a budget
    of all keeps all.

    uniqueness, size: float32 (S, G), size is tokens per group. budget: int64 (S,).
    """
    there = size > 0
    p = (uniqueness / temperature).masked_fill(~there, -torch.inf).softmax(1)
    share = (budget / size.sum(1).clamp(min=1))[:, None]
    scale = (share * (1 + p - 1 / there.sum(1, keepdim=True).clamp(min=1))).clamp(max=1)
    allotted = (scale * size).round().clamp(min=1).long()
    return torch.where((budget >= size.sum(1))[:, None], size.long(), allotted)


@selection
def fewest_with_mass(score: Tensor, label: Tensor, count: int, share: float) -> Tensor:
    """Return int64 (S, G), the fewest tokens of each group, best first, whose scores sum to a share of all of them.

    score: (S, N), negative ones and -inf count as 0. label: int64 (S, N), from 0 to count - 1, -1 for none. share: in
    (0, 1]. At least one of each group that holds tokens; zeros at the end are not needed.
    """
    there = label >= 0
    amount = score.detach().double().clamp(min=0).masked_fill(~there, 0).nan_to_num()
    safe = label.masked_fill(~there, count)
    by_score = amount.masked_fill(~there, -1).argsort(dim=1, descending=True, stable=True)
    group, second = safe.gather(1, by_score).sort(dim=1, stable=True)
    order = by_score.gather(1, second)
    sorted_amount = amount.gather(1, order)
    total = amount.new_zeros(len(label), count + 1).scatter_add(1, safe, amount)
    # What stands before each token in its group: the running sum less that of the groups before.
    running = sorted_amount.cumsum(1) - sorted_amount
    begins = total.cumsum(1) - total
    before = running - begins.gather(1, group)
    wanted = (before < share * total.gather(1, group) * (1 - 1e-9)) & (group < count)
    allotted = torch.zeros(len(label), count + 1, dtype=torch.int64, device=label.device)
    allotted = allotted.scatter_add(1, group, wanted.long())[:, :count]
    holds = torch.zeros_like(allotted).scatter_add(1, label.clamp(min=0), there.long())
    return allotted.clamp(min=1).minimum(holds)
