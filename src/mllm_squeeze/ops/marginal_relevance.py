"""Tokens picked one by one that are relevant and unlike those picked before."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import unit
from .select import positions, take

# Numbers that are nearer to each other than that are a tie, so that rounding does not decide.
_GRAINS = float(1 << 20)


@selection
def marginal_relevance(x: Tensor, mask: Tensor, relevance: Tensor, k: Tensor, steps: int, weight: float) -> Tensor:
    """Return bool (S, N), the k tokens of each span picked greedily by maximal marginal relevance.

    The first one is the most relevant; each other is that of largest weight * relevance - (1 - weight) * cosine to the
    most like it of those picked. x: (S, N, d). relevance: (S, N). k: int64 (S,). steps: host number, the largest k.
    """
    x = unit(x).nan_to_num()
    worth = relevance.double().nan_to_num(nan=-1e6, neginf=-1e6)
    nearest, chosen, place = torch.full_like(worth, -torch.inf), torch.zeros_like(mask), positions(mask)
    closed = ~mask
    for step in range(min(steps, mask.shape[1])):
        gain = worth if step == 0 else weight * worth - (1 - weight) * nearest
        pick = (gain * _GRAINS).round().masked_fill(closed, -torch.inf).argmax(1, keepdim=True)
        picked = (place == pick) & mask & ~closed & (step < k)[:, None]
        chosen, closed = chosen | picked, closed | picked
        nearest = torch.maximum(nearest, (x @ take(x, pick).transpose(1, 2))[..., 0].double())
    return chosen
