"""How much, and in which direction, a module changes a token."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32, selection


@selection
def transition(given: Tensor, added: Tensor, present: Tensor, signed: bool) -> Tensor:
    """Return float32 (S, M): |w| / |u| times the softmax over tokens of 1 - cos(u, w), what a module makes of u.

    arXiv 2507.20630. given, added: u and w, (S, M, D). present: bool (S, M), the tokens that take part. signed: False
    takes 1 - |cos|, so that a turn by 90 degrees counts most.
    """
    u, w = at_least_float32(given), at_least_float32(added)
    long, short = torch.linalg.vector_norm(w, dim=-1), torch.linalg.vector_norm(u, dim=-1)
    tiny = torch.finfo(u.dtype).tiny
    cosine = (u * w).sum(-1) / (long * short).clamp(min=tiny)
    turn = 1 - (cosine if signed else cosine.abs())
    share = turn.masked_fill(~present, -torch.inf).softmax(1)
    return (long / short.clamp(min=tiny) * share).masked_fill(~present, 0)
