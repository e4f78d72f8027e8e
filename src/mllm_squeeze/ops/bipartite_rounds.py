"""Pairs of like tokens that merge round after round, half of what is there at most in each."""

from __future__ import annotations

import torch
from torch import Tensor

from .merge import bipartite_match, mean_weights, merge_tokens
from .precision import at_least_float32, selection
from .select import positions


@selection
def bipartite_rounds(x: Tensor, mask: Tensor, keep: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Return (assign, weights), int64 and float32 (S, N): who goes into whom when so many are left, and with what part.

    In each round tokens at even positions of what is left merge into the most like one at an odd position, see
    `bipartite_match`, and a token becomes the mean of what goes into it, whatever that stood for. x: (S, N, d). keep:
    int64 (S,). rounds: host number.
    """
    x = at_least_float32(x)
    into = positions(mask).expand_as(mask).masked_fill(~mask, -1)
    weights, left = mask.float(), mask
    for _ in range(rounds):
        assign = bipartite_match(x, left, (left.sum(1) - keep).clamp(min=0))
        share = mean_weights(assign)
        x = merge_tokens(x, assign, share)
        held = into.clamp(min=0)
        weights = weights * share.gather(1, held)
        into = assign.gather(1, held).masked_fill(~mask, -1)
        left = left & (assign == positions(assign))
    return into, weights.masked_fill(torch.logical_not(mask), 0)
