"""Greedy selection with the whole loop inside one launch: farthest point, and the MAP of a determinantal point
process.

Both keep one number per token (the distance to the nearest pick; the variance that the picks do not explain), take
the largest, and update all numbers from the picked token's row of a similarity matrix. That is a chain of dependent
steps, so what counts is the latency of a step. One program per span holds the numbers in registers for the whole
loop; a step is one reduction and one row of N floats from L2 (11.5 KB for 2,880 tokens). Hence the matrix is computed
first, at full speed on the tensor cores (bf16 in, float32 sums, norms applied afterwards, so nothing is lost to
rounding to bf16).

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

from ..score import own_variance, unit
from . import launching, power_of_two, readable
from .match import best_target, inverse_norms

# Entries of the matrix of all pairs that may be held at once: 2 ** 28 float32 numbers are 1 GiB.
GRAM_LIMIT = 1 << 28
# Numbers per token are held in the registers of one program.
WIDTH_LIMIT = 1 << 15


@triton.jit
def _gram(
    x, scale, mask, out, N, d, stride_span, stride_row, stride_dim, out_row,
    DISTANCE: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(2).to(tl.int64)
    x += span * stride_span
    a = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dot = tl.zeros((BLOCK, BLOCK), tl.float32)
    left_row = a.to(tl.int64)[:, None] * stride_row
    right_row = b.to(tl.int64)[None, :] * stride_row
    for first in range(0, d, BD):
        dims = first + tl.arange(0, BD)
        inside = dims < d
        left = tl.load(x + left_row + dims[None, :] * stride_dim, mask=(a < N)[:, None] & inside[None, :], other=0.0)
        right = tl.load(x + right_row + dims[:, None] * stride_dim, mask=(b < N)[None, :] & inside[:, None], other=0.0)
        dot = tl.dot(left, right, dot)
    left_scale = tl.load(scale + span * N + a, mask=a < N, other=0.0)
    right_scale = tl.load(scale + span * N + b, mask=b < N, other=0.0)
    value = dot * left_scale[:, None] * right_scale[None, :]
    if DISTANCE:
        there = tl.load(mask + span * N + b, mask=b < N, other=0) != 0
        value = tl.where((a[:, None] == b[None, :]) | ~there[None, :], float("inf"), 1 - value)
    place = (span * N + a.to(tl.int64))[:, None] * out_row + b[None, :]
    tl.store(out + place, value, mask=(a < N)[:, None] & (b < N)[None, :])


def gram(x: Tensor, mask: Tensor, quality: Tensor | None, distance: bool) -> Tensor:
    """Return float32 (S, N, N'), N' >= N: products of the rows of x (S, N, D) scaled to length `quality` (None: 1).

    distance: 1 - that instead, infinite to itself and to padding.
    """
    if x.dtype == torch.float32:
        return _exact_gram(x, mask, quality, distance)
    x = readable(x)
    spans, width, dim = x.shape
    scale = inverse_norms(x)
    if quality is not None:
        scale = scale * quality.float()
    # Rows of whole 64 bytes, so that they can be read in wide loads.
    row = triton.cdiv(width, 16) * 16
    out = torch.empty(spans, width, row, device=x.device)
    block = 128 if width > 128 else min(64, power_of_two(width))
    blocks = triton.cdiv(width, block)
    with launching(x):
        _gram[(blocks, blocks, spans)](
            x, scale, mask.contiguous(), out, width, dim, *x.stride(), row, DISTANCE=distance, BLOCK=block,
            BD=min(64, power_of_two(dim)), num_warps=8 if block == 128 else 4, num_stages=3,
        )  # fmt: skip
    return out


def _exact_gram(x: Tensor, mask: Tensor, quality: Tensor | None, distance: bool) -> Tensor:
    """Return the same for float32, by the reference's own arithmetic: the tensor cores would round it to TF32."""
    x = unit(x) if quality is None else unit(x) * quality[..., None].float()
    out = x @ x.transpose(1, 2)
    if distance:
        out = (1 - out).masked_fill_(~mask[:, None], torch.inf)
        out.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return out


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


def _group(spans: int, width: int) -> int:
    """Return how many spans go through the matrix at once; 0 where not even one does."""
    return min(spans, GRAM_LIMIT // (width * triton.cdiv(width, 16) * 16)) if width <= WIDTH_LIMIT else 0


def supports(x: Tensor, mask: Tensor, matrix: bool = False) -> bool:
    """Return whether the kernels take these shapes. matrix: they need the matrix of all pairs."""
    return x.shape[1] > 0 and x.shape[2] > 0 and (not matrix or _group(mask.shape[0], mask.shape[1]) > 0)


def farthest_point(x: Tensor, mask: Tensor, k: Tensor, steps: int) -> Tensor:
    """Return bool (S, N), as `ops.farthest_point`."""
    k = torch.minimum(k, mask.sum(1)).clamp(max=steps)
    size = _group(*mask.shape)
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
    """Return bool (S, N), as `ops.dpp_map`; `supports(..., matrix=True)` must hold."""
    k = torch.minimum(k, mask.sum(1)).clamp(max=steps)
    size = _group(*mask.shape)
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


@triton.jit(do_not_specialize=["step"])
def _step(
    x, inverse, mask, count, nearest, winner_in, index_in, winner_out, index_out, chosen, step, N, d, blocks,
    stride_span, stride_row, stride_dim, BN: tl.constexpr, BD: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(1).to(tl.int64)
    x += span * stride_span
    block = tl.arange(0, BLOCKS)
    best = tl.load(winner_in + span * blocks + block, mask=block < blocks, other=float("-inf"))
    index = tl.load(index_in + span * blocks + block, mask=block < blocks, other=N - 1)
    pick = tl.minimum(tl.min(tl.where(best == tl.max(best, 0), index, N - 1), 0), N - 1)
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
    high, place = tl.max(now, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(winner_out + span * blocks + tl.program_id(0), high)
    tl.store(index_out + span * blocks + tl.program_id(0), (tl.program_id(0) * BN + place).to(tl.int64))


def _by_rows(x: Tensor, mask: Tensor, k: Tensor, steps: int) -> Tensor:
    """Return bool (S, N), farthest points with each pick's row computed when it is needed, one launch per pick."""
    spans, width, dim = x.shape
    mask = mask.contiguous()
    everything = torch.arange(width, device=x.device).expand(spans, -1)
    nearest = 1 - best_target(x, everything, everything, mask, others=True)[0]
    nearest = nearest.masked_fill(~mask, -torch.inf)
    block = 64
    blocks = triton.cdiv(width, block)
    padded = torch.nn.functional.pad(nearest, (0, blocks * block - width), value=-torch.inf)
    best, place = padded.view(spans, blocks, block).max(2)
    offset = torch.arange(0, width, block, device=x.device)
    # Two sets of block winners: a launch reads one while it writes the other.
    winners = [(best, place + offset), (torch.empty_like(best), torch.empty_like(place))]
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
