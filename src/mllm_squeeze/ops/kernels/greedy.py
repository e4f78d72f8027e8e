"""Greedy selection with the whole loop inside one launch: farthest point, and the MAP of a determinantal point
process.

Both keep one number per token (the distance to the nearest pick; the variance that the picks do not explain), take
the largest, and update all numbers from the picked token's row of a similarity matrix. That is a chain of dependent
steps, so what counts is the latency of a step. One program per span holds the numbers in registers for the whole
loop; a step is one reduction and one row of N floats from L2 (11.5 KB for 2,880 tokens). Hence the matrix is computed
first, at full speed on the tensor cores (bf16 in, float32 sums, norms applied afterwards, so nothing is lost to
rounding to bf16, see gram.py).

Recomputing a row instead means reading all N * D features per pick: 20 MB for 2,880 tokens of size 3,584, which one
multiprocessor cannot do in time, at any N. So the matrix is used as long as it fits in memory that may be borrowed
(GRAM_LIMIT entries, 1 GiB, 16k tokens); spans go through it in groups. Above that, rows are recomputed by the whole
GPU, one launch per pick: each program first finds the last pick among the block winners of the launch before, then
updates its own tokens and leaves its winner. Nothing waits for the host. Ties go to the lowest index throughout.
"""

# Triton functions have no types of ours.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..score import own_variance
from . import launching, power_of_two
from .gram import gram, group
from .match import best_target, inverse_norms


@triton.jit
def _greedy(
    matrix, start, mask, count, floor, factors, chosen, N, row_stride, steps, DPP: tl.constexpr, BN: tl.constexpr
):
    span = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    inside = n < N
    # -inf marks what cannot be picked: padding, and what has been.
    score = tl.load(start + span * N + n, mask=inside, other=float("-inf"))
    score = tl.where(tl.load(mask + span * N + n, mask=inside, other=0) != 0, score, float("-inf"))
    lowest = tl.load(floor + span)
    factors += span * steps * N
    for step in range(0, tl.load(count + span)):
        best, pick = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        # NaN must not lead outside.
        pick = tl.minimum(pick, N - 1)
        closed = (score == float("-inf")) | (n == pick)
        row = tl.load(matrix + (span * N + pick) * row_stride + n, mask=inside, other=0.0)
        if DPP:
            for t in tl.range(0, step, loop_unroll_factor=4 if BN <= 8192 else 1):
                known = factors + t * N
                row -= tl.load(known + pick) * tl.load(known + n, mask=inside, other=0.0)
            row = tl.where(best > 0, row / tl.sqrt(tl.maximum(best, 1e-30)), 0.0)
            tl.store(factors + step * N + n, row, mask=inside)
            # The next step reads in every thread what this one wrote in some.
            tl.debug_barrier()
            score -= row * row
            score = tl.where(score > lowest, score, 0.0)
        else:
            score = tl.where(step == 0, row, tl.minimum(score, row))
        score = tl.where(closed, float("-inf"), score)
    real = tl.load(mask + span * N + n, mask=inside, other=0) != 0
    tl.store(chosen + span * N + n, (real & (score == float("-inf"))).to(tl.int8), mask=inside)


def _select(
    matrix: Tensor, start: Tensor, mask: Tensor, k: Tensor, floor: Tensor, factors: Tensor, dpp: bool
) -> Tensor:
    spans, width = mask.shape
    chosen = torch.empty(spans, width, dtype=torch.int8, device=mask.device)
    block = power_of_two(width)
    with launching(matrix):
        _greedy[(spans,)](
            matrix, start, mask, k, floor, factors, chosen, width, matrix.stride(1), factors.shape[1], DPP=dpp,
            BN=block, num_warps=min(32, max(1, block // 256)),
        )  # fmt: skip
    return chosen.bool()


def farthest_point(x: Tensor, mask: Tensor, k: Tensor, steps: int) -> Tensor:
    """Return bool (S, N), as `ops.farthest_point`."""
    k = torch.minimum(k, mask.sum(1)).clamp(max=steps)
    size = group(*mask.shape)
    if size == 0:
        return _by_rows(x, mask, k, steps)
    chosen = []
    for i in range(0, mask.shape[0], size):
        there = mask[i : i + size].contiguous()
        distance = gram(x[i : i + size], there, None, distance=True)
        nearest = distance[..., : mask.shape[1]].amin(2)
        # Not used by this rule.
        nothing = distance.new_zeros(there.shape[0], 1, 1)
        chosen.append(_select(distance, nearest, there, k[i : i + size], nothing, nothing, dpp=False))
    return torch.cat(chosen)


def dpp_map(x: Tensor, mask: Tensor, k: Tensor, steps: int, quality: Tensor | None = None) -> Tensor:
    """Return bool (S, N), as `ops.dpp_map`; `gram.supports(..., matrix=True)` must hold."""
    k = torch.minimum(k, mask.sum(1)).clamp(max=steps)
    size = group(*mask.shape)
    chosen = []
    for i in range(0, mask.shape[0], size):
        there = mask[i : i + size].contiguous()
        rank = None if quality is None else quality[i : i + size]
        kernel = gram(x[i : i + size], there, rank, distance=False)
        variance = own_variance(x[i : i + size], there, rank)
        floor = variance.amax(1) * 1e-6
        factors = torch.empty(there.shape[0], max(1, min(steps, mask.shape[1])), mask.shape[1], device=x.device)
        chosen.append(_select(kernel, variance, there, k[i : i + size], floor, factors, dpp=True))
    return torch.cat(chosen)


@triton.jit
def last_pick(winner, index, span, blocks, N, BLOCKS: tl.constexpr):
    """Return the best of the winners that the blocks of the launch before left."""
    block = tl.arange(0, BLOCKS)
    best = tl.load(winner + span * blocks + block, mask=block < blocks, other=float("-inf"))
    place = tl.load(index + span * blocks + block, mask=block < blocks, other=N - 1)
    # NaN must not lead outside.
    return tl.minimum(tl.min(tl.where(best == tl.max(best, 0), place, N - 1), 0), N - 1)


@triton.jit
def leave_winner(winner, index, score, span, blocks, BN: tl.constexpr):
    """Store the best of this block's scores (BN,), and which token has it."""
    best, place = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(winner + span * blocks + tl.program_id(0), best)
    tl.store(index + span * blocks + tl.program_id(0), (tl.program_id(0) * BN + place).to(tl.int64))


def first_winners(score: Tensor, block: int) -> list[tuple[Tensor, Tensor]]:
    """Return two sets of block winners (S, blocks), values and tokens; a launch reads one while it writes the other.

    score: (S, N), -inf at padding.
    """
    spans, width = score.shape
    blocks = triton.cdiv(width, block)
    padded = torch.nn.functional.pad(score, (0, blocks * block - width), value=-torch.inf)
    best, place = padded.view(spans, blocks, block).max(2)
    place = place + torch.arange(0, width, block, device=score.device)
    return [(best, place), (torch.empty_like(best), torch.empty_like(place))]


@triton.jit(do_not_specialize=["step"])
def _step(
    x, inverse, mask, count, nearest, winner_in, index_in, winner_out, index_out, chosen, step, N, d, blocks,
    stride_span, stride_row, stride_dim, BN: tl.constexpr, BD: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(1).to(tl.int64)
    x += span * stride_span
    pick = last_pick(winner_in, index_in, span, blocks, N, BLOCKS)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    dot = tl.zeros((BN,), tl.float32)
    for first in range(0, d, BD):
        dims = first + tl.arange(0, BD)
        there = dims < d
        own = tl.load(x + pick * stride_row + dims * stride_dim, mask=there, other=0.0).to(tl.float32)
        place = n.to(tl.int64)[:, None] * stride_row + dims[None, :] * stride_dim
        rows = tl.load(x + place, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
        dot += tl.sum(rows * own[None, :], 1)
    scale = tl.load(inverse + span * N + n, mask=inside, other=0.0) * tl.load(inverse + span * N + pick)
    distance = 1 - dot * scale
    before = tl.load(nearest + span * N + n, mask=inside, other=float("-inf"))
    taken = tl.load(chosen + span * N + n, mask=inside, other=1) != 0
    taken = taken | ((n == pick) & (step < tl.load(count + span)))
    tl.store(chosen + span * N + n, taken.to(tl.int8), mask=inside)
    real = tl.load(mask + span * N + n, mask=inside, other=0) != 0
    now = tl.where(step == 0, distance, tl.minimum(before, distance))
    now = tl.where(real & ~taken, now, float("-inf"))
    tl.store(nearest + span * N + n, now, mask=inside)
    leave_winner(winner_out, index_out, now, span, blocks, BN)


def _by_rows(x: Tensor, mask: Tensor, k: Tensor, steps: int) -> Tensor:
    """Return bool (S, N), farthest points with each pick's row computed when it is needed, one launch per pick."""
    spans, width, dim = x.shape
    mask = mask.contiguous()
    everything = torch.arange(width, device=x.device).expand(spans, -1)
    nearest = 1 - best_target(x, everything, everything, mask, others=True)[0]
    nearest = nearest.masked_fill(~mask, -torch.inf)
    block = 64
    blocks = triton.cdiv(width, block)
    winners = first_winners(nearest, block)
    chosen = torch.zeros(spans, width, dtype=torch.int8, device=x.device)
    inverse = inverse_norms(x)
    with launching(x):
        for step in range(min(steps, width)):
            old, new = winners[step % 2], winners[1 - step % 2]
            _step[(blocks, spans)](
                x, inverse, mask, k, nearest, *old, *new, chosen, step, width, dim, blocks, *x.stride(), BN=block,
                BD=min(64, power_of_two(dim)), BLOCKS=power_of_two(blocks), num_warps=4,
            )  # fmt: skip
    return chosen.bool()
