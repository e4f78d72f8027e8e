"""Tokens that are dropped in rounds, each round those most like another."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import cosine, unit
from .select import best_first, compact_indices, put_back, take


@selection
def drop_alike_in_rounds(x: Tensor, score: Tensor, mask: Tensor, k: Tensor, at_once: int) -> Tensor:
    """Return bool (S, N), the k tokens of each span that are left when those most like another are dropped in rounds.

    The tokens stand in a list, by descending score at first. A round compares those at even places with those at odd
    ones and drops up to `at_once` of the former, those of largest cosine to any of the latter; the rest of the former,
    most alike first, stand in front of the latter in the next round. VisPruner, arXiv 2412.01818. x: (S, N, D). score:
    (S, N). k: int64 (S,). Memory O(S * N * N). Ties: the first of the list.
    """
    index, filled = best_first(score, mask, mask.shape[1])
    x = unit(take(x, index).masked_fill(~filled[..., None], 0))
    alike = cosine(x, x, normed=True)
    width = mask.shape[1]
    place = torch.arange(width, device=mask.device).expand(mask.shape)
    # Numbers of the sorted tokens: (S, N), the first `there` of them are in the list.
    listed, there = place, filled.sum(1)
    for _ in range(_rounds(width, at_once)):
        listed, there = _one_round(alike, listed, there, k, at_once)
    left = torch.zeros_like(mask)
    inside = place < torch.minimum(there, torch.maximum(k, torch.zeros_like(k)))[:, None]
    return put_back(left, take(index, listed), inside, inside)


def _rounds(width: int, at_once: int) -> int:
    """Return how many rounds there are at most: full ones, and those of the end, which halve the list."""
    return -(-width // at_once) + at_once.bit_length() + 1


def _one_round(alike: Tensor, listed: Tensor, there: Tensor, k: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    """Return the list (S, N) and its length (S,) after a round."""
    even, odd = listed[:, 0::2], listed[:, 1::2]
    evens, odds = (there + 1).div(2, rounding_mode="floor"), there.div(2, rounding_mode="floor")
    drop = torch.minimum((there - k).clamp(min=0, max=at_once), evens)[:, None]
    rows = take(alike, even)
    products = rows.gather(2, odd[:, None].expand(-1, even.shape[1], -1))
    known = torch.arange(odd.shape[1], device=odd.device) < odds[:, None]
    # Below any cosine, but above what is not in the list.
    most = products.masked_fill(~known[:, None], -2).amax(2) if odd.shape[1] else products.new_full(even.shape, -2)
    inside = torch.arange(even.shape[1], device=even.device) < evens[:, None]
    order = most.nan_to_num().masked_fill(~inside, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(order.shape[1], device=order.device)
    keep = torch.cat([(rank >= drop) & inside, known], 1)
    index, filled = compact_indices(keep, listed.shape[1])
    following = take(torch.cat([take(even, order), odd], 1), index).masked_fill(~filled, 0)
    # Where nothing is dropped the list stays as it is.
    moved = drop > 0
    return torch.where(moved, following, listed), there - drop[:, 0]
