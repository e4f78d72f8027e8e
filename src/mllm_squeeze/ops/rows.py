"""Groups of tokens as rows of their own, so that what works on spans works on groups."""

from __future__ import annotations

import torch
from torch import Tensor

from .select import positions


def group_rows(label: Tensor, count: int, slots: int) -> tuple[Tensor, Tensor]:
    """Return (int64, bool) (S, count * slots): ascending members of each group, and which slots hold one.

    label: int64 (S, N), -1 for none. slots: host number, at least the size of the largest group; more are cut off.
    Unused slots hold 0.
    """
    width = label.shape[1]
    safe = torch.where(label < 0, count, label)
    order = safe.argsort(dim=1, stable=True)
    by_group = safe.gather(1, order)
    place = positions(order).expand_as(order)
    starts = torch.ones_like(by_group, dtype=torch.bool)
    starts[:, 1:] = by_group[:, 1:] != by_group[:, :-1]
    within = place - torch.where(starts, place, 0).cummax(dim=1).values
    # What is of no group, and what does not fit, writes to a column of its own, which is cut off.
    slot = torch.where((by_group < count) & (within < slots), by_group * slots + within, count * slots)
    index = order.new_full((label.shape[0], count * slots + 1), width)
    index = index.scatter(1, slot, order)[:, : count * slots]
    filled = index < width
    return index.masked_fill(~filled, 0), filled
