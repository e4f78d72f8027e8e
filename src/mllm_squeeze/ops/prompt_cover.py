"""Tokens that cover the words of the prompt, and then all other tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .greedy import picks_from
from .precision import selection
from .score import cosine, unit
from .select import compact_indices, positions, ranks, take, top_k_mask


@selection
def nearest_to_words(
    visual: Tensor,
    mask: Tensor,
    text: Tensor,
    words: Tensor,
    each: Tensor,
    count: Tensor,
    bonus: Tensor | None = None,
) -> Tensor:
    """Return bool (S, N), the best of those tokens that are among the nearest of a word.

    A token is worth its largest cosine to a word that it is near to, plus the word's bonus. visual: (S, N, D). mask:
    bool (S, N). text: (S, T, D). words: bool (S, T). each: int64 (S, T), how many tokens are near to a word. count:
    int64 (S,), how many are taken, all where there are fewer. bonus: float32 (S, T).
    """
    alike = cosine(text, visual).masked_fill(~mask[:, None], -torch.inf)
    rank = ranks(alike.flatten(0, 1), mask[:, None].expand_as(alike).flatten(0, 1)).view_as(alike)
    near = (rank < each[..., None]) & words[..., None] & mask[:, None]
    worth = alike if bonus is None else alike + bonus[..., None]
    best = worth.masked_fill(~near, -torch.inf).amax(1)
    return top_k_mask(best, near.any(1), count)


@selection
def farthest_from(x: Tensor, mask: Tensor, seeds: Tensor, k: Tensor, slots: int, steps: int) -> Tensor:
    """Return bool (S, N): the seeds, and k more tokens, each the farthest from all that are there already.

    Distance is 1 - cosine; without a seed the first token begins. x: (S, N, D). mask, seeds: bool (S, N). k: int64
    (S,). slots, steps: host numbers, at least the most seeds of a span, and the largest k.
    """
    x = unit(x).nan_to_num()
    index, filled = compact_indices(seeds, slots)
    far = 1 - cosine(take(x, index), x, normed=True)
    nearest = far.masked_fill(~filled[..., None], torch.inf).amin(1)
    return seeds | picks_from(x, nearest, mask & ~seeds, k, steps)


@selection
def cover_of_both(
    visual: Tensor, mask: Tensor, text: Tensor, words: Tensor, prompted: Tensor, total: Tensor, mix: float, steps: int
) -> Tensor:
    """Return bool (S, N): the tokens most like any word, a sample of the farthest ones, and the best by both.

    The sample, of as many as the prompt leaves of the total, is drawn on its own, from the longest vector of unit
    length on, so that both may share tokens; what is then missing are the largest of mix * likeness + (1 - mix) *
    distance from the sample, both scaled to 0 and 1. visual: (S, N, D). mask: bool (S, N). text: (S, T, D). words: bool
    (S, T). prompted, total: int64 (S,). steps: host number, the largest total.
    """
    alike = cosine(text, visual).masked_fill(~words[..., None], -torch.inf).amax(1)
    alike = alike.masked_fill(~words.any(1, keepdim=True), 0)
    first = top_k_mask(alike, mask, prompted)
    x = unit(visual).nan_to_num()
    number = total - first.sum(1)
    length = torch.linalg.vector_norm(x, dim=-1).masked_fill(~mask, -torch.inf)
    place = positions(mask)
    pick = length.argmax(1, keepdim=True)
    nearest = torch.full_like(length, torch.inf)
    sample = torch.zeros_like(mask)
    for step in range(steps):
        more = (step < number)[:, None]
        far = 1 - (x @ take(x, pick).transpose(1, 2))[..., 0]
        nearest = torch.where(more, torch.minimum(nearest, far), nearest)
        sample = sample | ((place == pick) & more)
        pick = nearest.masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)
    nearest = nearest.masked_fill(nearest.isinf(), 0)
    worth = mix * _zero_to_one(alike, mask) + (1 - mix) * _zero_to_one(nearest, mask)
    taken = first | (sample & mask)
    return taken | top_k_mask(worth, mask & ~taken, total - taken.sum(1))


def _zero_to_one(x: Tensor, mask: Tensor) -> Tensor:
    low = x.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = x.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return (x - low) / (high - low).clamp(min=1e-12)
