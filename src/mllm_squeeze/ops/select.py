"""Choosing tokens: ranks and top-k with a budget per span, compaction. Ties: lowest index first.

Throughout, S is spans, N tokens of the longest span, and `mask` bool (S, N) is False at padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import available
from .precision import at_least_float32, on_device, selection


def _comparable(scores: Tensor, mask: Tensor) -> Tensor:
    """Return scores in which NaN and -inf of real tokens are the lowest finite number and padding is below it."""
    scores = at_least_float32(scores.detach())
    lowest = torch.finfo(scores.dtype).min
    scores = torch.where(scores.isnan(), lowest, scores).clamp(min=lowest)
    return scores.masked_fill(~mask, -torch.inf)


def _invert(order: Tensor, values: Tensor) -> Tensor:
    """Return the tensor in which entry order[s, i] is values[s, i]."""
    return torch.empty_like(order).scatter_(1, order, values.expand_as(order))


def positions(like: Tensor) -> Tensor:
    """Return int64 (1, N), the index of each token, for `like` (S, N, ...)."""
    return torch.arange(like.shape[1], device=like.device)[None]


@selection
def ranks(scores: Tensor, mask: Tensor) -> Tensor:
    """Return int64 (S, N), the rank of each token by descending score: 0 is the best, padding comes last.

    scores: (S, N), any float dtype; NaN counts as the lowest score.
    """
    order = _comparable(scores, mask).argsort(dim=1, descending=True, stable=True)
    return _invert(order, positions(order))


@selection
def top_k_mask(scores: Tensor, mask: Tensor, k: Tensor | int) -> Tensor:
    """Return bool (S, N), True at the k tokens of highest score of each span, all of them where there are fewer.

    scores: (S, N), any float dtype; NaN counts as the lowest score. k: int64 (S,), a number per span, or one for all.
    """
    limit = k[:, None] if isinstance(k, Tensor) else k
    return (ranks(scores, mask) < limit) & mask


@selection
def best_first(scores: Tensor, mask: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Return (int64 (S, slots), bool (S, slots)): the tokens of highest score, best first, and which slots hold one.

    scores: (S, N), any float dtype; NaN counts as the lowest score. Unused slots hold 0.
    """
    order = _comparable(scores, mask).argsort(dim=1, descending=True, stable=True)[:, :slots]
    order = torch.nn.functional.pad(order, (0, slots - order.shape[1]))
    filled = torch.arange(slots, device=mask.device)[None] < mask.sum(1, keepdim=True)
    return order.masked_fill(~filled, 0), filled


@selection
def rank_within(scores: Tensor, groups: Tensor, mask: Tensor) -> Tensor:
    """Return int64 (S, N), the rank of each token by descending score among the tokens of its group; N at padding.

    scores: (S, N). groups: int64 (S, N), any numbers below 2 ** 62, compared within a span only.
    """
    width = groups.shape[1]
    by_score = _comparable(scores, mask).argsort(dim=1, descending=True, stable=True)
    group = groups.masked_fill(~mask, 1 << 62).gather(1, by_score)
    group, second = group.sort(dim=1, stable=True)
    order = by_score.gather(1, second)
    place = positions(order).expand_as(order)
    starts = torch.ones_like(mask)
    starts[:, 1:] = group[:, 1:] != group[:, :-1]
    first = torch.where(starts, place, 0).cummax(dim=1).values
    return _invert(order, place - first).masked_fill(~mask, width)


def seeded_noise(mask: Tensor, counts: Sequence[int], seed: int) -> Tensor:
    """Return float32 (S, N), uniform noise in [0, 1) at the True tokens; it depends on the seed and a row's count only.

    counts: the number of True in each row of mask (S, N), on the host. Drawn on the CPU, so that devices agree.
    """
    noise = torch.zeros(mask.shape)
    for row, count in enumerate(counts):
        noise[row, :count] = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return on_device(noise, mask).gather(1, local_index(mask).clamp(min=0))


def local_index(mask: Tensor) -> Tensor:
    """Return int64 (S, N), the place of each token among the True ones of its span; -1 where mask is False."""
    return torch.where(mask, mask.long().cumsum(1) - 1, -1)


def compact_indices(mask: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Return (int64 (S, slots), bool (S, slots)): ascending indices of the True tokens, and which slots hold one.

    slots: host number, at least the largest count of True; more are cut off. Unused slots hold 0.
    """
    place = local_index(mask)
    place = torch.where((place < 0) | (place >= slots), slots, place)
    index = torch.zeros(mask.shape[0], slots + 1, dtype=torch.int64, device=mask.device)
    index = index.scatter(1, place, positions(mask).expand_as(place))[:, :slots]
    filled = torch.arange(slots, device=mask.device)[None] < mask.sum(1, keepdim=True)
    return index.masked_fill(~filled, 0), filled


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return x[s, index[s, i]], (S, I, ...) from x (S, N, ...) and int64 index (S, I)."""
    tail = x.shape[2:]
    return x.gather(1, index.view(*index.shape, *(1,) * len(tail)).expand(*index.shape, *tail))


def gather_together(index: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the rows `index` (B, M) of several tensors, each with its own leading shape kept; gradients flow.

    A tensor of floats is (B or 1, T, D), or (A, B or 1, T, D) for several tables in one; of integers or bools it has no
    D. Results have B for the batch and M for T. On a GPU one launch takes up to four.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) and tensors and available(tensors[0]):
        from .kernels import gather as fast

        if fast.supports(tensors):
            return fast.gather_together(index, tensors)
    return tuple(_gather(index, t) if t.is_floating_point() else _gather(index, t[..., None])[..., 0] for t in tensors)


def _gather(index: Tensor, x: Tensor) -> Tensor:
    """Return the rows `index` (B, M) of x (..., B or 1, T, D)."""
    x = x.expand(*x.shape[:-3], index.shape[0], -1, -1)
    return x.gather(-2, index[..., None].expand(*x.shape[:-2], index.shape[1], x.shape[-1]))


def put_back(base: Tensor, index: Tensor, filled: Tensor, values: Tensor) -> Tensor:
    """Return a copy of base (S, N) with values (S, I) written at index (S, I) where `filled` holds."""
    # Unused slots write to a column of their own, which is cut off: several writes to one place have no order.
    width = base.shape[1]
    padded = torch.nn.functional.pad(base, (0, 1))
    return padded.scatter(1, torch.where(filled, index, width), values.to(base.dtype))[:, :width]


@selection
def scaled_bar(scores: Tensor, mask: Tensor, above: float, of: str) -> Tensor:
    """Return float32 (S, 1), the number that a score is compared with: `above`, or that multiple of the mean or max.

    scores: (S, N); -inf and padding take no part. of: "score", "mean" or "max"; raises ValueError for another word.
    """
    scores = at_least_float32(scores)
    there = mask & ~scores.isinf()
    if of == "score":
        return scores.new_full((len(scores), 1), above)
    if of == "mean":
        return above * scores.masked_fill(~there, 0).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    if of == "max":
        return above * scores.masked_fill(~there, -torch.inf).amax(1, keepdim=True)
    raise ValueError(f"a score is compared with a number, a multiple of the mean or of the max; got {of!r}")
