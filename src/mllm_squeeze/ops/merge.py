"""Merging tokens: who is merged into whom, with which weight, and the merged features.

Throughout, `assign` is int64 (S, N): the token that each one is merged into, itself for survivors, -1 for dropped ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import available
from .precision import at_least_float32, selection
from .score import cosine, unit
from .segment import segment_sum
from .select import compact_indices, local_index, positions, put_back, rank_within, take, top_k_mask

# From an entry for so many pairs on, a matrix of all pairs is smaller than the rows of all entries, and faster.
_MANY = 16


def merge_tokens(x: Tensor, assign: Tensor, weights: Tensor) -> Tensor:
    """Return (S, N, D) where token t is the sum of weight * x over the tokens assigned to it; others keep x.

    x: (S, N, D), any float dtype; sums run in float32 and the result has the dtype of x. weights: (S, N). Gradients
    flow to x and weights.
    """
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
    if not wants_gradient and x.numel() and available(x) and weights.dtype != torch.float64:
        from .kernels import match as fast

        return fast.merge_tokens(x, assign, weights)
    width = x.shape[1]
    total = segment_sum(at_least_float32(x) * weights[..., None], assign, width)
    return torch.where(is_target(assign)[..., None], total.to(x.dtype), x)


def mix_tokens(
    x: Tensor, span: Tensor, into: Tensor, source: Tensor, weight: Tensor, giving: Tensor | None = None
) -> Tensor:
    """Return (S, N, D) where a token is the sum of weight * x over the entries that go into it; others keep x.

    x: (S, N, D), any float dtype; sums run in float32 and the result has the dtype of x. span, into, source: int64
    (E,), the row, the token that receives and the token that gives. weight: (E,). giving: int64 (E,), the row of the
    token that gives, None where it is the same. Gradients flow to x and weight.
    """
    spans, width, channels = x.shape
    if giving is None and len(span) * _MANY > spans * width * width:
        total = _mixed_by_matrix(at_least_float32(x), span, into, source, at_least_float32(weight))
    else:
        rows = at_least_float32(x)[span if giving is None else giving, source] * at_least_float32(weight)[:, None]
        total = rows.new_zeros(spans * width, channels).index_add(0, span * width + into, rows).view(x.shape)
    receives = torch.zeros(spans * width, dtype=torch.bool, device=x.device)
    receives = receives.index_fill(0, span * width + into, True).view(spans, width, 1)
    return torch.where(receives, total.to(x.dtype), x)


def _mixed_by_matrix(x: Tensor, span: Tensor, into: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """Return (S, N, D), the sums of `mix_tokens`, where rows of all entries would be many times as much as x."""
    spans, width, _ = x.shape
    # Padding may hold anything, even NaN, which a weight of 0 would not hide.
    given = torch.zeros(spans * width, dtype=torch.bool, device=x.device)
    given = given.index_fill(0, span * width + source, True).view(spans, width, 1)
    matrix = weight.new_zeros(spans * width * width).index_add(0, (span * width + into) * width + source, weight)
    return matrix.view(spans, width, width) @ x.masked_fill(~given, 0)


def mixed_size(
    size: Tensor, span: Tensor, into: Tensor, source: Tensor, weight: Tensor, giving: Tensor | None = None
) -> Tensor:
    """Return float32 (S, N), what each token stands for when every giver's size is shared in proportion to its weights.

    size: (S, N). The rest as in `mix_tokens`; a giver whose weights sum to nothing shares evenly. Tokens that receive
    nothing keep their size.
    """
    width = size.shape[1]
    size = at_least_float32(size)
    giver, taker = (span if giving is None else giving) * width + source, span * width + into
    amount = at_least_float32(weight).abs()
    flat = size.reshape(-1)
    given = torch.zeros_like(flat).index_add(0, giver, amount)[giver]
    entries = torch.zeros_like(flat).index_add(0, giver, torch.ones_like(amount))[giver]
    part = torch.where(given > 0, amount / given.clamp(min=torch.finfo(flat.dtype).tiny), 1 / entries)
    total = torch.zeros_like(flat).index_add(0, taker, part * flat[giver])
    receives = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, taker, True)
    return torch.where(receives, total, flat).view(size.shape)


@selection
def strongest_target(
    keep: Tensor, span: Tensor, into: Tensor, source: Tensor, weight: Tensor, giving: Tensor | None = None
) -> Tensor:
    """Return assign (S, N): survivors to themselves, others to the token they go into with the largest weight, else -1.

    keep: bool (S, N). The rest as in `mix_tokens`; weights count by their size, ties take the lowest index; 0 is no
    weight. What goes into a token of another row goes nowhere in its own.
    """
    if giving is not None:
        own = giving == span
        span, into, source, weight = span[own], into[own], source[own], weight[own]
    width = keep.shape[1]
    giver = span * width + source
    amount = at_least_float32(weight.detach()).abs()
    largest = torch.zeros(keep.numel(), dtype=amount.dtype, device=keep.device)
    largest = largest.scatter_reduce(0, giver, amount, "amax")
    candidate = torch.where((amount == largest[giver]) & (amount > 0), into, width)
    target = torch.full((keep.numel(),), width, dtype=torch.int64, device=keep.device)
    target = target.scatter_reduce(0, giver, candidate, "amin").view(keep.shape)
    return torch.where(keep, positions(keep), torch.where(target == width, -1, target))


def is_target(assign: Tensor) -> Tensor:
    """Return bool (S, N), True at tokens that some token is assigned to."""
    return segment_sum((assign >= 0).float(), assign, assign.shape[1]) > 0


def mean_weights(assign: Tensor, size: Tensor | None = None) -> Tensor:
    """Return float32 (S, N), the weights of a mean over the tokens of each target; zero for dropped tokens.

    size: (S, N), how much each token counts; None counts each once.
    """
    there = assign >= 0
    share = there.float() if size is None else at_least_float32(size).masked_fill(~there, 0)
    total = segment_sum(share, assign, assign.shape[1]).gather(1, assign.clamp(min=0))
    return torch.where(total > 0, share / total.clamp(min=torch.finfo(total.dtype).tiny), 0)


def added_mean_weights(assign: Tensor) -> Tensor:
    """Return float32 (S, N), the weights of target + mean of the tokens merged into it; 1 at targets, 0 at dropped."""
    own = assign == positions(assign)
    others = torch.where(own, -1, assign)
    return own.float() + mean_weights(others)


def running_mean_weights(assign: Tensor) -> Tensor:
    """Return float32 (S, N), the weights of a target that is averaged with each of its tokens in turn; 0 at dropped.

    Of n tokens the last counts a half, the one before a quarter, and so on; the target what is left.
    """
    own = assign == positions(assign)
    others = (assign >= 0) & ~own
    behind = rank_within(positions(assign).expand_as(assign).float(), assign, others)
    counts = torch.zeros(assign.shape, device=assign.device).scatter_add(1, assign.clamp(min=0), others.float())
    half = torch.full(assign.shape, 0.5, device=assign.device)
    weight = torch.where(own, half**counts, half ** (behind + 1).float())
    return weight.masked_fill(assign < 0, 0)


def merged_size(assign: Tensor, size: Tensor) -> Tensor:
    """Return float32 (S, N), the sum of `size` over the tokens assigned to each target; `size` elsewhere."""
    return torch.where(is_target(assign), segment_sum(size, assign, assign.shape[1]), at_least_float32(size))


def _best_target(x: Tensor, source: Tensor, target: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return ((S, A), int64 (S, A)): the largest cosine of each source row to a real target, and the target's column.

    x: (S, N, d). source: int64 (S, A). target: int64 (S, B), with real bool (S, B).
    """
    if x.numel() and source.numel() and available(x):
        from .kernels import match as fast

        return fast.best_target(x, source, target, real)
    x = unit(x)
    similar = cosine(take(x, source), take(x, target), normed=True).masked_fill(~real[:, None], -torch.inf)
    best, column = similar.max(2)
    return best, column


@selection
def bipartite_match(metric: Tensor, mask: Tensor, r: Tensor, lead: int = 0) -> Tensor:
    """Return assign (S, N): the r best-matched tokens at even positions are merged into tokens at odd positions.

    ToMe's bipartite soft matching. metric: (S, N, d), compared by cosine in float32. r: int64 (S,), capped at half of
    the tokens. lead: tokens that stand before these and take part in the count of positions only (1 with a CLS token,
    so that odd patches are merged into even ones). Many tokens may go to one; ties take the lowest index.
    """
    place = local_index(mask)
    even = mask & ((place + lead) % 2 == 0)
    odd = mask & ~even
    half = (mask.shape[1] + 1) // 2
    source, from_real = compact_indices(even, half)
    target, to_real = compact_indices(odd, half)
    best, column = _best_target(metric, source, target, to_real)
    merged = top_k_mask(best, from_real, torch.minimum(r, mask.sum(1) // 2))
    destination = torch.where(merged, target.gather(1, column), source)
    return put_back(torch.where(mask, positions(mask), -1), source, from_real, destination)


@selection
def nearest_target(x: Tensor, targets: Tensor, members: Tensor, slots: int) -> Tensor:
    """Return assign (S, N): members go to the target of largest cosine (the first on ties), targets to themselves.

    x: (S, N, d). targets, members: bool (S, N). slots: host number, at least the largest count of targets. Members of a
    span without target, and tokens that are neither, get -1.
    """
    index, filled = compact_indices(targets, slots)
    assign = torch.where(targets, positions(targets), -1)
    if slots == 0:
        return assign
    _, column = _best_target(x, positions(targets).expand_as(targets), index, filled)
    choice = index.gather(1, column)
    return torch.where(members & ~targets & filled[:, :1], choice, assign)


@selection
def merged_into_best(x: Tensor, score: Tensor, mask: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return (keep, assign): the best candidates by score, and those of their worse half that go into the better one.

    x: (S, N, d). score: (S, N). k: int64 (S,), tokens to keep. Of k + floor(k / 2) candidates (at most all) the worse
    half, one more where they are odd, is compared by cosine with the better one; those most like a token of it go there
    until k are left. Ties take the lowest index. Memory (S, N, N).
    """
    k = k.minimum(mask.sum(1))
    total = (k + k // 2).minimum(mask.sum(1))
    better = top_k_mask(score, mask, total // 2)
    worse = top_k_mask(score, mask, total) & ~better
    unit_x = unit(x.masked_fill(~(better | worse)[..., None], 0))
    alike, column = cosine(unit_x, unit_x, normed=True).masked_fill(~better[:, None], -torch.inf).max(2)
    merged = top_k_mask(alike, worse, total - k)
    keep = (better | worse) & ~merged
    assign = torch.where(keep, positions(mask), torch.where(merged, column, -1))
    return keep, assign


def _squared_distances(x: Tensor, mask: Tensor) -> Tensor:
    """Return (S, M, M), the squared Euclidean distances of x (S, M, D) over D, 0 on the diagonal."""
    x = at_least_float32(x)
    mean = segment_sum(x, torch.where(mask, 0, -1), 1) / mask.sum(1).clamp(min=1)[:, None, None]
    x = (x - mean).masked_fill(~mask[..., None], 0)  # smaller numbers, smaller rounding errors in the product below
    square = x.square().sum(-1)
    distance = (square[:, :, None] + square[:, None] - 2 * x @ x.transpose(1, 2)).clamp(min=0) / x.shape[-1]
    distance.diagonal(dim1=1, dim2=2).zero_()
    return distance


@selection
def closest_survivor(x: Tensor, keep: Tensor, label: Tensor) -> Tensor:
    """Return assign (S, N): each token's nearest survivor of its group by Euclidean distance, the first on ties.

    x: (S, N, D). keep: bool (S, N). label: int64 (S, N), -1 for none. Tokens of groups without survivor get -1. Memory
    O(S * N * N).
    """
    same = (label[:, :, None] == label[:, None]) & keep[:, None]
    distance = _squared_distances(x, label >= 0).masked_fill(~same, torch.inf)
    joined = torch.where((label >= 0) & same.any(2), distance.argmin(2), -1)
    return torch.where(keep, positions(keep), joined)


@selection
def density_peaks(x: Tensor, mask: Tensor, clusters: Tensor, neighbours: int | Tensor | None = None) -> Tensor:
    """Return assign (S, M): each token's cluster centre by density-peak clustering over nearest neighbours.

    Distance d is Euclidean / sqrt(D). Density = exp(-mean of the squared `neighbours` smallest d, its own 0 included);
    of equal ones the lower index is denser. Separation = smallest d to a denser token, for the densest the largest d
    of all. Centres are the `clusters` tokens of largest density * separation; the others join the nearest centre.

    x: (S, M, D). mask: bool (S, M). clusters: int64 (S,). neighbours: one number, or int64 (S,); None takes as many as
    clusters. Memory O(S * M * M).
    """
    distance = _squared_distances(x, mask)
    real = mask[:, :, None] & mask[:, None]
    near = distance.masked_fill(~real, torch.inf).sort(dim=2).values
    neighbours = clusters if neighbours is None else neighbours
    looked_at = torch.as_tensor(neighbours, device=mask.device).expand_as(clusters).minimum(mask.sum(1))
    counted = positions(mask)[:, None] < looked_at[:, None, None]
    # The logarithm orders alike, and does not underflow where features are far apart.
    density = -near.masked_fill(~counted, 0).sum(2) / looked_at.clamp(min=1)[:, None]
    distance = distance.sqrt()
    place = positions(mask)
    earlier = place[:, None] < place[:, :, None]
    denser = (density[:, None] > density[:, :, None]) | ((density[:, None] == density[:, :, None]) & earlier)
    gap = distance.masked_fill(~(real & denser), torch.inf).amin(2)
    largest = distance.masked_fill(~real, 0).amax((1, 2))
    gap = torch.where(gap.isinf(), largest[:, None], gap)
    centres = top_k_mask(density + gap.log(), mask, clusters)
    joined = distance.masked_fill(~centres[:, None], torch.inf).argmin(2)
    return torch.where(centres, place, joined).masked_fill(~mask, -1)
