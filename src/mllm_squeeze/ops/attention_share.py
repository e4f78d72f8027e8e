"""Attention to a span as shares of what the span gets."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection


@selection
def attention_share(received: Tensor, mask: Tensor) -> Tensor:
    """Return float32 (S, N), the share of each token in what its span gets of each head, mean over heads.

    It is the softmax over the tokens of the span only. received: (S, H, N). mask: bool (S, N).
    """
    received = received.float().masked_fill(~mask[:, None], 0)
    total = received.sum(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (received / total).mean(1)
