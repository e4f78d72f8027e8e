"""How many numbers stand out from those near them: the local outlier factor on a line."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection


@selection
def local_outlier_factors(x: Tensor, there: Tensor, neighbours: int) -> Tensor:
    """Return float64 (S, N), how much sparser it is around each number than around its nearest ones; 1 for padding.

    The local outlier factor of Breunig et al. (2000) in one dimension. x: (S, N). there: bool (S, N). neighbours: how
    many nearest others are looked at, all where there are fewer. Memory O(S * N * N).
    """
    x = x.detach().double()
    count = there.sum(1, keepdim=True)
    most = min(neighbours, max(x.shape[1] - 1, 1))
    far = (x[:, :, None] - x[:, None]).abs().masked_fill(~there[:, None], torch.inf)
    far.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    near = far.sort(dim=2, stable=True)
    distance, index = near.values[..., :most], near.indices[..., :most]
    looked_at = (torch.arange(most, device=x.device) < (count - 1)[..., None]).expand_as(distance)
    number = looked_at.sum(2).clamp(min=1)
    reach = distance.masked_fill(~looked_at, -torch.inf).amax(2)
    others = reach.gather(1, index.flatten(1)).view_as(distance)
    density = 1 / (torch.maximum(distance, others).masked_fill(~looked_at, 0).sum(2) / number + 1e-10)
    around = density.gather(1, index.flatten(1)).view_as(distance).masked_fill(~looked_at, 0).sum(2) / number
    return (around / density).where(there & (count > 1), torch.ones_like(density))
