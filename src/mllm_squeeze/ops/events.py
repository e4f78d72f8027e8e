"""A video cut into events, runs of like frames, the best of them, and a token for each."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import unit
from .select import top_k_mask


@selection
def event_runs(x: Tensor, there: Tensor, cuts: Tensor, below: float | None = None) -> Tensor:
    """Return int64 (S, T), the run of each frame, counted from 0; a run ends where the next frame is unlike it.

    Each frame is compared, by its cosine, with the last one before it that is there. x: (S, T, d). there: bool (S, T).
    cuts: int64 (S,), how many there are, where frames are least alike, the first of equal ones. below: cut wherever the
    cosine is below it instead.
    """
    x = unit(x)
    place = torch.arange(x.shape[1], device=x.device).expand_as(there)
    last = torch.where(there, place, -1).cummax(1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    alike = (x * x.gather(1, before.clamp(min=0)[..., None].expand_as(x))).sum(-1)
    pairs = there & (before >= 0)
    # What rounding tells apart is a tie.
    cut = top_k_mask(-(alike * 2**20).round(), pairs, cuts) if below is None else pairs & (alike < below)
    return cut.long().cumsum(1)


@selection
def best_groups(value: Tensor, there: Tensor, share: float) -> Tensor:
    """Return bool (S, G), the share of the groups that are there, rounded up, that have the largest values.

    value: (S, G). there: bool (S, G).
    """
    number = (there.sum(1).double() * share - 1e-9).ceil().long()
    return top_k_mask(value, there, number)


@selection
def one_each(counts: Tensor, size: Tensor, weight: Tensor) -> Tensor:
    """Return int64 (S, G), counts of the same sum that leave no group empty that holds something, if there are so many.

    One after the other the group of largest count gives a token to the one of largest weight that has none, as long as
    it has two. counts, size: int64 (S, G). weight: (S, G).
    """
    counts = counts.clone()
    for _ in range(counts.shape[1] - 1):
        most, giver = counts.max(1, keepdim=True)
        empty = (counts == 0) & (size > 0)
        taker = weight.double().masked_fill(~empty, -torch.inf).argmax(1, keepdim=True)
        moved = ((most > 1) & empty.any(1, keepdim=True)).long()
        counts = counts.scatter_add(1, giver, -moved).scatter_add(1, taker, moved)
    return counts
