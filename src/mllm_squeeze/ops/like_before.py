"""What each token is like at its place one frame before, and runs of tokens that are joined to what stands before."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import unit
from .select import positions, take

# Below any cosine: what has nothing before it.
NOTHING_BEFORE = -2.0


def _in_order(place: Tensor, mask: Tensor) -> Tensor:
    """Return int64 (S, N), the tokens by place, then by index; padding last."""
    return place.masked_fill(~mask, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)


@selection
def likeness_before(x: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """Return float32 (S, N), the cosine of each token to the last one before it at the same place; -2 where is none.

    x: (S, N, D). place: int64 (S, N), any numbers. mask: bool (S, N).
    """
    order = _in_order(place, mask)
    rows, sorted_place = take(unit(x.masked_fill(~mask[..., None], 0)), order), place.gather(1, order)
    both = (sorted_place[:, 1:] == sorted_place[:, :-1]) & mask.gather(1, order)[:, 1:]
    alike = (rows[:, 1:] * rows[:, :-1]).sum(-1).masked_fill(~both, NOTHING_BEFORE)
    alike = torch.nn.functional.pad(alike, (1, 0), value=NOTHING_BEFORE)
    return torch.empty_like(alike).scatter(1, order, alike)


@selection
def joined_to_before(joins: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """Return assign int64 (S, N): what joins goes into the last token before it at its place that does not.

    All others go into themselves, -1 at padding. joins: bool (S, N), never the first at its place. place, mask: as in
    `likeness_before`.
    """
    order = _in_order(place, mask)
    stands = ~joins.gather(1, order)
    last = positions(order).where(stands, 0).cummax(1).values
    return torch.empty_like(order).scatter(1, order, order.gather(1, last)).masked_fill(~mask, -1)
