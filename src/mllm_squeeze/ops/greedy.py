"""Greedy choices: each pick depends on those before. Batched over spans, one small step per pick; ties: lowest index.

Throughout, S is spans, N tokens of the longest span, and `mask` bool (S, N) is False at padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import available
from .precision import at_least_float32, selection
from .score import in_grains, likeness, own_variance, unit
from .select import positions, put_back, take, top_k_mask

# Above this many entries the matrix of all pairs is not held; rows are computed when they are needed.
_GRAM_LIMIT = 1 << 27


def _gram(x: Tensor) -> Tensor:
    """Return x @ x^T, (S, N, N); on a CPU each pair of blocks is multiplied once, and it is symmetric to the last bit.

    Two tokens that are nearest to each other tie then, whatever a batch of another shape makes of the rounding.
    """
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
        square = out[:, start:stop, start:stop]
        out[:, start:stop, start:stop] = torch.maximum(square, square.transpose(1, 2))
    return out


def _distances(x: Tensor, mask: Tensor, start: int, stop: int) -> Tensor:
    """Return (S, stop - start, N), cosine distances from some unit vectors to all; infinite to itself and padding."""
    whole = start == 0 and stop == x.shape[1]
    products = _gram(x) if whole else x[:, start:stop] @ x.transpose(1, 2)
    distance = products.neg_().add_(1).masked_fill_(~mask[:, None], torch.inf)
    distance.diagonal(offset=start, dim1=1, dim2=2).fill_(torch.inf)
    return distance


@selection
def farthest_point(x: Tensor, mask: Tensor, k: Tensor, steps: int, weight: Tensor | None = None) -> Tensor:
    """Return bool (S, N), the k tokens of each span picked greedily, each the farthest from those picked before.

    The first one is the token farthest from its nearest neighbour; distance is 1 - cosine in float32; a picked token is
    never picked again. x: (S, N, D). k: int64 (S,). steps: host number, the largest k. weight: (S, N), not negative:
    distances are multiplied by it, and the first one is that of largest weight (greedy weighted k-centre). Memory
    (S, N, N), or (S, N, D) where that is too much or there are weights.
    """
    if weight is not None:
        return _weighted_centres(x, mask, k, steps, weight)
    if available(x):
        from .kernels import gram, greedy

        if gram.supports(x, mask):
            return greedy.farthest_point(x, mask, k, steps)
    # What is no number counts as far from all, padding included.
    x = unit(x).nan_to_num_()
    width, block = mask.shape[1], _block(mask)
    blocks = (_distances(x, mask, start, min(width, start + block)) for start in range(0, width, block))
    # With one block all distances are at hand; else each row is computed when it is needed.
    whole = next(blocks) if block == width else None
    nearest = whole.amin(2) if whole is not None else torch.cat([b.amin(2) for b in blocks], 1)
    nearest = nearest.masked_fill(~mask, -torch.inf)
    picks: list[Tensor] = []
    # A step is a few small operations, and what can wait until the end waits. Once -inf, never picked again.
    for step in range(min(steps, width)):
        pick = nearest.argmax(1, keepdim=True)
        picks.append(pick)
        row = _row(whole, pick) if whole is not None else 1 - (x @ take(x, pick).transpose(1, 2))[..., 0]
        nearest = torch.minimum(nearest, row) if step else row.masked_fill(~mask, -torch.inf)
        nearest.scatter_(1, pick, -torch.inf)
    return _first_picks(picks, mask, k)


def picks_from(x: Tensor, nearest: Tensor, free: Tensor, k: Tensor, steps: int) -> Tensor:
    """Return bool (S, N), the k tokens of each span picked greedily, each the farthest from those picked before.

    x: (S, N, D), of length 1. nearest: float32 (S, N), the distances to what was picked earlier. free: bool (S, N),
    what may be picked. k: int64 (S,). steps: host number, the largest k.
    """
    nearest, picks = nearest.masked_fill(~free, -torch.inf), []
    for _ in range(min(steps, free.shape[1])):
        pick = nearest.argmax(1, keepdim=True)
        picks.append(pick)
        row = 1 - (x @ take(x, pick).transpose(1, 2))[..., 0]
        nearest = torch.minimum(nearest, row).scatter(1, pick, -torch.inf)
    return _first_picks(picks, free, k)


def _weighted_centres(x: Tensor, mask: Tensor, k: Tensor, steps: int, weight: Tensor) -> Tensor:
    x, weight = unit(x).nan_to_num_(), weight.to(torch.float32)
    distance, worth = torch.full_like(weight, torch.inf), weight
    closed, picks = ~mask, []
    for _ in range(min(steps, mask.shape[1])):
        pick = worth.masked_fill(closed, -torch.inf).argmax(1, keepdim=True)
        closed = closed.scatter(1, pick, True)
        picks.append(pick)
        # Rounding may put a copy of a picked token a little nearer than nought.
        row = (1 - (x @ take(x, pick).transpose(1, 2))[..., 0]).clamp(min=0)
        distance = torch.minimum(distance, row)
        worth = distance * weight
    return _first_picks(picks, mask, k)


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
        from .kernels import gram, greedy

        if gram.supports(x, mask, matrix=True):
            return greedy.dpp_map(x, mask, k, steps, quality)
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


@selection
def log_det(x: Tensor, mask: Tensor, k: Tensor, steps: int, gamma: float) -> Tensor:
    """Return bool (S, N), the k tokens of each span picked greedily for the largest log det(I + gamma * A A^T).

    A = Y Y^T, Y the vectors with each channel divided by its length over the tokens of the span. arXiv 2602.20205. x:
    (S, N, D). k: int64 (S,). steps: host number, the largest k. Memory (S, N, N) and (S, steps, N).
    """
    x = at_least_float32(x).masked_fill(~mask[..., None], 0)
    channel: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    alike = _gram(x / channel.clamp(min=torch.finfo(x.dtype).tiny))
    variance = 1 + gamma * alike.square().sum(2)
    closed, picks = ~mask, []
    factors = x.new_zeros(mask.shape[0], min(steps, mask.shape[1]), mask.shape[1])
    for step in range(factors.shape[1]):
        best, pick = variance.masked_fill(closed, -torch.inf).max(1, keepdim=True)
        closed = closed.scatter(1, pick, True)
        picks.append(pick)
        known = factors[:, :step]
        at_pick = known.gather(2, pick[:, None].expand(-1, step, -1))
        kernel = gamma * (alike @ _row(alike, pick)[..., None])[..., 0]
        kernel = kernel.scatter_add(1, pick, torch.ones_like(best))
        # No token that is left falls below 1, the share of I; spans that are all picked are not looked at any more.
        row = (kernel - (known * at_pick).sum(1)) / best.clamp(min=1).sqrt()
        factors[:, step] = row
        variance = variance - row.square()
    return _first_picks(picks, mask, k)


@selection
def facility_location(
    x: Tensor,
    mask: Tensor,
    k: Tensor,
    steps: int,
    bonus: Tensor | None = None,
    weight: Tensor | None = None,
    clipped: bool = False,
) -> Tensor:
    """Return bool (S, N), the k tokens of each span picked greedily so that every token has one like it among them.

    Each pick adds the most to the sum over all tokens of their likeness to the closest pick, times its weight, plus its
    bonus; likeness is (1 + cosine) / 2, or the cosine, as in CATP, arXiv 2508.07871, and SCOPE, arXiv 2510.24214. x:
    (S, N, D). bonus: (S, N), None for none. weight: (S, N), not negative, None where all count alike. k: int64 (S,).
    steps: host number, the largest k. clipped: take the cosine, 0 where it is negative. Memory (S, N, N), or (N, N)
    where that is too much.
    """
    bonus = torch.zeros_like(mask, dtype=torch.float32) if bonus is None else bonus
    if available(x) and weight is None and not clipped:
        from .kernels import cover, gram

        if gram.supports(x, mask, matrix=True):
            return cover.facility_location(x, mask, k, steps, bonus)
    weight = torch.ones_like(mask, dtype=torch.float32) if weight is None else weight
    spans = max(1, _GRAM_LIMIT // max(1, mask.shape[1] ** 2))
    parts = zip(*(t.split(spans) for t in (x, mask, k, bonus, weight)), strict=True)
    return torch.cat(
        [_cover(likeness(_gram(unit(x)), m, clipped), m, k, steps, in_grains(b), w) for x, m, k, b, w in parts]
    )


def _cover(alike: Tensor, mask: Tensor, k: Tensor, steps: int, bonus: Tensor, weight: Tensor) -> Tensor:
    covered = alike.new_zeros(mask.shape)
    closed, picks = ~mask, []
    for _ in range(min(steps, mask.shape[1])):
        gain = (alike - covered[:, None]).clamp_(min=0).sum(2).double() * weight.double() + bonus
        pick = gain.masked_fill(closed, -torch.inf).argmax(1, keepdim=True)
        closed = closed.scatter(1, pick, True)
        picks.append(pick)
        covered = torch.maximum(covered, _row(alike, pick))
    return _first_picks(picks, mask, k)


@selection
def least_alike_in_turns(mask: Tensor, likeness: Sequence[Tensor], there: Sequence[Tensor], total: Tensor) -> Tensor:
    """Return bool (S, N): pivots take turns, and each takes the tokens least like it that are still to be had.

    mask: tokens to be had. likeness: parts (S, P, N) side by side, of each pivot to each token. there: parts bool
    (S, P), which pivots exist. total: int64 (S,), tokens to take in all, shared evenly, the first pivots one more.
    """
    alike, exists = torch.cat(list(likeness), 1), torch.cat(list(there), 1)
    sharing = exists.sum(1).clamp(min=1)
    turn = exists.cumsum(1) - 1
    quota = total.div(sharing, rounding_mode="floor")[:, None] + (turn < (total % sharing)[:, None])
    quota = quota * exists
    if available(alike):
        from .kernels import turns

        if turns.supports(alike):
            return turns.least_alike_in_turns(mask, alike, quota)
    taken = torch.zeros_like(mask)
    for row, count in zip(alike.unbind(1), quota.unbind(1), strict=True):
        taken = taken | top_k_mask(-row, mask & ~taken, count)
    return taken


def _row(whole: Tensor, pick: Tensor) -> Tensor:
    """Return row pick (S, 1) of each matrix, (S, N) from (S, N, N)."""
    spans, width = whole.shape[:2]
    first = torch.arange(0, spans * width, width, device=whole.device)
    return whole.flatten(0, 1).index_select(0, first + pick[:, 0])


def _block(mask: Tensor) -> int:
    """Return how many rows of the matrix of all pairs are held at once."""
    spans, width = mask.shape
    return max(1, min(width, _GRAM_LIMIT // max(1, spans * width)))


def _first_picks(picks: Sequence[Tensor], mask: Tensor, k: Tensor) -> Tensor:
    """Return bool (S, N), True at the first k of the picks (S, 1) each, at most as many as there are tokens."""
    if not picks:
        return torch.zeros_like(mask)
    turn = torch.arange(len(picks), device=mask.device)
    wanted = (turn < torch.minimum(k, mask.sum(1))[:, None]).expand(mask.shape[0], -1)
    return put_back(torch.zeros_like(mask), torch.cat(list(picks), 1), wanted, wanted)
