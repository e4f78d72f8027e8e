"""Tokens that are dense, and far from all that are denser."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import cosine, unit
from .select import positions


@selection
def lone_peaks(x: Tensor, neighbours: int) -> Tensor:
    """Return float32 (T, P), the density of each token times its distance to the nearest denser one of its row.

    Distance is 1 - cosine; density exp(-mean distance to the nearest others, so many of them); of equal ones the lower
    index is denser. For the densest the distance is that to the farthest. arXiv 2511.14582. x: (T, P, D). Memory
    O(T * P * P).
    """
    x = unit(x)
    width = x.shape[1]
    far = (1 - cosine(x, x, normed=True)).clamp(min=0)
    itself = torch.eye(width, dtype=torch.bool, device=x.device)
    near = far.masked_fill(itself, torch.inf).sort(dim=2).values[..., : min(neighbours, width - 1)]
    density = torch.exp(-near.sum(2) / max(near.shape[2], 1))
    place = positions(density)
    earlier = place[:, None] < place[:, :, None]
    denser = (density[:, None] > density[:, :, None]) | ((density[:, None] == density[:, :, None]) & earlier)
    gap = far.masked_fill(~denser, torch.inf).amin(2)
    return density * torch.where(gap.isinf(), far.amax(2), gap)
