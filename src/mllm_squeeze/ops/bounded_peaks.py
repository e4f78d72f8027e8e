"""Centres of clusters whose radius is bounded: the densest token first, and none within a distance of another."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import cosine, unit
from .select import positions


@selection
def bounded_peaks(x: Tensor, mask: Tensor, cutoff: float, spread: float) -> tuple[Tensor, Tensor]:
    """Return (bool (S, N), int64 (S, N)): the centres, and how dense each token is, 0 for the least.

    Tokens are visited by falling density; one becomes a centre if its distance to all centres before it is larger than
    the cutoff. Distance is 1 - cosine, at least 0; density the sum over tokens of exp(-(distance / spread) ** 2); of
    equal ones the higher index is denser, as a stable sort has it. arXiv 2504.08966. x: (S, N, d). mask: bool (S, N).
    Memory O(S * N * N); it waits for the device once per round.
    """
    x = unit(x.masked_fill(~mask[..., None], 0))
    far = (1 - cosine(x, x, normed=True)).clamp(min=0)
    both = mask[:, :, None] & mask[:, None]
    density = torch.exp(-((far / spread) ** 2)).masked_fill(~both, 0).sum(2)
    order = density.masked_fill(~mask, -torch.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, positions(order).expand_as(order))
    near = both & (far <= cutoff)
    denser = near & (rank[:, None] > rank[:, :, None])
    centres, open_ = torch.zeros_like(mask), mask
    # In each round those without a denser neighbour that is still open; what they cover can be none any more.
    while bool(open_.any()):
        new = open_ & ~(denser & open_[:, None]).any(2)
        centres = centres | new
        open_ = open_ & ~new & ~(near & new[:, None]).any(2)
    return centres, rank
