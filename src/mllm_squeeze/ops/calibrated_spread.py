"""Tokens that are far from each other, where distances count by how much a token is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import cosine
from .select import positions


@selection
def calibrated_spread(x: Tensor, worth: Tensor, steps: int, again: bool) -> Tensor:
    """Return bool (R, M), the tokens picked greedily: each of largest distance to those picked, times its worth.

    The first one is that of largest distance to its nearest token. Distance is 1 - cosine, 0 to itself. arXiv
    2602.08024. x: (R, M, D). worth: (R, M), of either sign. steps: host number of picks. again: what was picked may be
    picked again, which counts as a pick, so that fewer tokens are found where all others are worth less than nothing.
    Memory (R, M, M).
    """
    far = 1 - cosine(x, x)
    far.diagonal(dim1=1, dim2=2).zero_()
    far = far * worth[:, None]
    width = x.shape[1]
    # Of the column of a token: the smallest number is its own, unless it is worth less than nothing.
    value = far.kthvalue(min(2, width), dim=1).values
    nearest = torch.full_like(value, torch.inf)
    picked = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(min(steps, width)):
        pick = value.argmax(1, keepdim=True)
        picked |= positions(picked) == pick
        nearest = nearest.minimum(far.gather(1, pick[..., None].expand(-1, -1, width))[:, 0])
        value = nearest if again else nearest.masked_fill(picked, -torch.inf)
    return picked
