"""Choosing tokens: ranks and top-k with a budget per span, farthest points, compaction. Ties: lowest index first.

Throughout, S is spans, N tokens of the longest span, and `mask` bool (S, N) is False at padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import available
from .precision import at_least_float32, on_device, selection
from .score import own_variance, unit

# Above this many entries the matrix of all distances is not built; rows are computed when they are needed.
_GRAM_LIMIT = 1 << 27


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


def _gram(x: Tensor) -> Tensor:
    """Return x @ x^T, (S, N, N); on a CPU each pair of blocks is multiplied once."""
    if x.device.type != "cpu":
        return x @ x.transpose(1, 2)
    width = x.shape[1]
    block = max(64, -(-width // 8))
    out = x.new_empty(x.shape[0], width, width)
    for start in range(0, width, block):
        stop = min(width, start + block)
        part = x[:, start:stop] @ x[:, start:].transpose(1, 2)
        out[:, start:stop, start:] = part
        out[:, stop:, start:stop] = part[..., stop - start :].transpose(1, 2)
    return out


def _distances(x: Tensor, mask: Tensor, start: int, stop: int) -> Tensor:
    """Return (S, stop - start, N), cosine distances from some unit vectors to all; infinite to itself and padding."""
    whole = start == 0 and stop == x.shape[1]
    products = _gram(x) if whole else x[:, start:stop] @ x.transpose(1, 2)
    distance = products.neg_().add_(1).masked_fill_(~mask[:, None], torch.inf)
    distance.diagonal(offset=start, dim1=1, dim2=2).fill_(torch.inf)
    return distance


@selection
def farthest_point(x: Tensor, mask: Tensor, k: Tensor, steps: int) -> Tensor:
    """Return bool (S, N), the k tokens of each span picked greedily, each the farthest from those picked before.

    The first one is the token farthest from its nearest neighbour; distance is 1 - cosine in float32; a picked token is
    never picked again. x: (S, N, D). k: int64 (S,). steps: host number, the largest k. One small step per pick, batched
    over spans; memory (S, N, N), or (S, N, D) where that is too much.
    """
    if available(x):
        from .kernels import greedy as fast

        if fast.supports(x, mask):
            return fast.farthest_point(x, mask, k, steps)
    x = unit(x)
    spans, width = mask.shape
    block = max(1, min(width, _GRAM_LIMIT // max(1, spans * width)))
    blocks = (_distances(x, mask, start, min(width, start + block)) for start in range(0, width, block))
    # With one block all distances are at hand; else each row is computed when it is needed.
    gram = next(blocks) if block == width else None
    nearest = gram.amin(2) if gram is not None else torch.cat([b.amin(2) for b in blocks], 1)
    # A step is a few small operations, so what can wait until the end waits.
    closed, picks = ~mask, []
    for step in range(min(steps, width)):
        pick = nearest.masked_fill(closed, -torch.inf).argmax(1, keepdim=True)
        closed.scatter_(1, pick, True)
        picks.append(pick)
        row = take(gram, pick)[:, 0] if gram is not None else 1 - (x @ take(x, pick).transpose(1, 2))[..., 0]
        nearest = row if step == 0 else torch.minimum(nearest, row)
    if not picks:
        return torch.zeros_like(mask)
    turn = torch.arange(len(picks), device=mask.device)
    wanted = (turn < torch.minimum(k, mask.sum(1))[:, None]).expand(spans, -1)
    return put_back(torch.zeros_like(mask), torch.cat(picks, 1), wanted, wanted)


@selection
def dpp_map(x: Tensor, mask: Tensor, k: Tensor, steps: int, quality: Tensor | None = None) -> Tensor:
    """Return bool (S, N), the k tokens of each span picked greedily for the largest determinant of their kernel.

    Greedy MAP of a determinantal point process, arXiv 1709.05135: the kernel is quality_i * cosine * quality_j, and
    each pick is the token of largest variance that the earlier picks do not explain. Variance below a millionth of the
    largest counts as none, so tokens that the picks explain fully follow by index. x: (S, N, D). quality: (S, N), not
    negative; None counts all alike. k: int64 (S,). steps: host number, the largest k. Memory (S, steps, N), and
    (S, N, N) with the kernels.
    """
    if available(x):
        from .kernels import greedy as fast

        if fast.supports(x, mask, matrix=True):
            return fast.dpp_map(x, mask, k, steps, quality)
    variance = own_variance(x, mask, quality)
    floor = variance.amax(1, keepdim=True) * 1e-6
    x = unit(x)
    if quality is not None:
        x = x * quality[..., None].to(x.dtype)
    place = positions(mask)
    chosen = torch.zeros_like(mask)
    factors = x.new_zeros(mask.shape[0], min(steps, mask.shape[1]), mask.shape[1])
    k = torch.minimum(k, mask.sum(1))
    for step in range(factors.shape[1]):
        best, pick = variance.masked_fill(~mask | chosen, -torch.inf).max(1, keepdim=True)
        chosen |= (place == pick) & (step < k)[:, None]
        known = factors[:, :step]
        at_pick = known.gather(2, pick[:, None].expand(-1, step, -1))
        row = (x @ take(x, pick).transpose(1, 2))[..., 0] - (known * at_pick).sum(1)
        row = torch.where(best > 0, row / best.clamp(min=1e-30).sqrt(), 0)
        factors[:, step] = row
        variance = variance - row.square()
        variance = torch.where(variance > floor, variance, 0)
    return chosen
