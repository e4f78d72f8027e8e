"""A budget shared by weight, where no group may have more than so many: what is over goes round."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .select import ranks
from .share import share_out


@selection
def dealt_out(total: Tensor, weights: Tensor, limit: Tensor) -> Tensor:
    """Return int64 (S, G), the total in proportion to the weights, by largest remainder, but at most the limit each.

    What is over is dealt one by one to the groups below their limit, those of largest weight first, round after round.
    total: int64 (S,); what no group has room for is lost. weights: (S, G), not negative. limit: int64 (S, G).
    """
    shares = share_out(total, weights).minimum(limit)
    room = limit - shares
    over = (total - shares.sum(1)).minimum(room.sum(1))[:, None]
    # So many whole rounds are dealt that the full ones, and what the others get in them, are no more than what is over.
    steps = room.sort(dim=1).values
    count = torch.arange(steps.shape[1], device=steps.device)
    others = steps.shape[1] - 1 - count
    full = (steps.cumsum(1) + steps * others <= over).sum(1, keepdim=True)
    filled = (steps * (count < full)).sum(1, keepdim=True)
    rounds = (over - filled).div((steps.shape[1] - full).clamp(min=1), rounding_mode="floor")
    dealt = torch.where(full == steps.shape[1], room, room.minimum(rounds))
    last = over - dealt.sum(1, keepdim=True)
    return shares + dealt + (ranks(weights, room > dealt) < last)
