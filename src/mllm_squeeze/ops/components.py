"""Tokens that are linked by likeness, and what they become when each set of linked ones is merged."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .rows import group_rows
from .score import cosine, unit
from .segment import segment_mean
from .select import compact_indices, positions, put_back, take


@selection
def linked_components(x: Tensor, mask: Tensor, above: Tensor) -> Tensor:
    """Return int64 (R, M), for each token the one that stands for all that it is linked with, -1 at padding.

    Two tokens are linked if their cosine is above a number, or both are linked with others that are. The one with most
    links stands for all, the first on ties. x: (R, M, D). mask: bool (R, M). above: float (R,). It waits for the device
    once per round.
    """
    x = unit(x.masked_fill(~mask[..., None], 0))
    both = mask[:, :, None] & mask[:, None]
    links = (cosine(x, x, normed=True) > above[:, None, None]) & both
    links.diagonal(dim1=1, dim2=2).copy_(mask)
    width = mask.shape[1]
    label = positions(mask).expand_as(mask).clone()
    while True:
        lowest = torch.where(links, label[:, None], width).amin(2).clamp(max=width - 1).minimum(label)
        lowest = lowest.gather(1, lowest)
        if torch.equal(lowest, label):
            break
        label = lowest
    # The number of links first, then the lower place.
    worth = links.sum(2) * width + (width - 1 - positions(mask))
    best = torch.zeros_like(worth).scatter_reduce(1, label, worth.masked_fill(~mask, -1), "amax")
    stands = width - 1 - best % width
    return stands.gather(1, label).masked_fill(~mask, -1)


@selection
def components_in_turn(
    x: Tensor, label: Tensor, count: int, slots: int, above: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (first, second, means): linked components of each group, and those of their means over the whole span.

    first, second: int64 (S, N), the token that stands for a token's component, in its group, and for the component of
    that component's mean. means: float32 (S, N, D), at those that stand for all, the mean over such a component of the
    means. x: (S, N, D). label: int64 (S, N), from 0 to count - 1, -1 for none. slots: host number, at least the size of
    the largest group. above: float (S,).
    """
    index, filled = group_rows(label, count, slots)
    rows = take(x, index).view(-1, slots, x.shape[2])
    own = linked_components(rows, filled.view(-1, slots), above.repeat_interleave(count)).view(len(label), count, slots)
    token = index.view(own.shape).gather(2, own.clamp(min=0)).flatten(1)
    first = put_back(torch.full_like(label, -1), index, filled, token)
    width = label.shape[1]
    means = segment_mean(x.float(), first, width)
    stands = linked_components(means, first == positions(label), above)
    second = stands.gather(1, first.clamp(min=0)).masked_fill(first < 0, -1)
    return first, second, segment_mean(means, stands, width)


@selection
def remerged(x: Tensor, targets: Tensor, means: Tensor, mask: Tensor, slots: int) -> Tensor:
    """Return int64 (S, N), the target whose mean each token is most like, the first on ties, -1 at padding.

    x, means: (S, N, D), means at the targets. targets, mask: bool (S, N). slots: host number of targets at most.
    """
    index, filled = compact_indices(targets, slots)
    alike = cosine(x, take(means, index)).masked_fill(~filled[:, None], -torch.inf)
    return index.gather(1, alike.argmax(2)).masked_fill(~mask, -1)
