"""How much of a budget groups get by the softmax of what they score."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .segment import segment_mean


@selection
def softmax_shares(score: Tensor, label: Tensor, size: Tensor, temperature: float) -> Tensor:
    """Return float64 (S, G) that sum to 1 in each row: the softmax of mean scores over temperature, times the size.

    score: (S, N), -inf (separators) takes no part in a mean. label: int64 (S, N), from 0 to G - 1, -1 for none. size:
    (S, G), tokens of each group; empty ones get 0.
    """
    pieces = label.masked_fill(~score.isfinite(), -1)
    mean = segment_mean(score.nan_to_num(0, posinf=0, neginf=0), pieces, size.shape[1]).double()
    share = (mean / temperature).masked_fill(size == 0, -torch.inf).softmax(1).nan_to_num(0) * size
    return share / share.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
