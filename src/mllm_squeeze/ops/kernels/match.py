"""Best partner by cosine without the matrix of all cosines, and merging without atomics.

`best_target`: a program owns a block of sources and walks the targets, keeping the best so far; the score matrix
lives in registers only. Sources and targets are rows of one tensor, picked by index on the way in. A later target
must be strictly better, so ties go to the lowest index.

`merge_tokens`: a program owns one token, scans who is assigned to it (a few thousand integers, from cache) and adds
those rows in ascending order in float32. torch's scatter_add uses atomics on a GPU, in an order that changes from run
to run; this has one writer per output and needs no sort.
"""

# Triton functions have no types of ours.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, power_of_two, precision, readable


def inverse_norms(x: Tensor) -> Tensor:
    """Return float32 (S, N), what each row of x (S, N, D) is multiplied with to have length 1."""
    length = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return 1 / length.clamp(min=torch.finfo(torch.float32).tiny)


@triton.jit
def _best(
    x, inverse, sources, targets, real, best, column, A, B, N, d, stride_span, stride_row, stride_dim,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, OTHERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(1).to(tl.int64)
    x += span * stride_span
    a = tl.program_id(0) * BM + tl.arange(0, BM)
    source = tl.load(sources + span * A + a, mask=a < A, other=0)
    scale = tl.load(inverse + span * N + source)
    top = tl.full((BM,), float("-inf"), tl.float32)
    found = tl.zeros((BM,), tl.int32)
    for start in range(0, B, BN):
        b = start + tl.arange(0, BN)
        target = tl.load(targets + span * B + b, mask=b < B, other=0)
        there = tl.load(real + span * B + b, mask=b < B, other=0) != 0
        dot = tl.zeros((BM, BN), tl.float32)
        for first in range(0, d, BD):
            dims = first + tl.arange(0, BD)
            left = tl.load(
                x + source[:, None] * stride_row + dims[None, :] * stride_dim, mask=(dims < d)[None, :], other=0.0
            )
            right = tl.load(
                x + target[None, :] * stride_row + dims[:, None] * stride_dim, mask=(dims < d)[:, None], other=0.0
            )
            dot = tl.dot(left, right, dot, input_precision=PRECISION)
        score = dot * scale[:, None] * tl.load(inverse + span * N + target)[None, :]
        score = tl.where(there[None, :], score, float("-inf"))
        if OTHERS:
            score = tl.where(source[:, None] == target[None, :], float("-inf"), score)
        high, place = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        better = high > top
        found = tl.where(better, start + place, found)
        top = tl.where(better, high, top)
    tl.store(best + span * A + a, top, mask=a < A)
    tl.store(column + span * A + a, found, mask=a < A)


def best_target(x: Tensor, source: Tensor, target: Tensor, real: Tensor, others: bool = False) -> tuple[Tensor, Tensor]:
    """Return (float32 (S, A), int64 (S, A)): the largest cosine of each source to a real target, and its column.

    x: (S, N, d). source: int64 (S, A), target: int64 (S, B), rows of x. real: bool (S, B), which targets there are;
    -inf and 0 where there is none. others: a row is no target of itself.
    """
    x = readable(x)
    spans, width, dim = x.shape
    count = source.shape[1]
    best = torch.empty(spans, count, device=x.device)
    column = torch.empty(spans, count, dtype=torch.int64, device=x.device)
    # Smaller blocks where there would be fewer programs than a large GPU has multiprocessors.
    block = 64 if spans * triton.cdiv(count, 64) >= 128 else 32
    source, target, real = source.contiguous(), target.contiguous(), real.contiguous()
    with launching(x):
        _best[(triton.cdiv(count, block), spans)](
            x, inverse_norms(x), source, target, real, best, column, count, target.shape[1], width, dim, *x.stride(),
            BM=block, BN=64, BD=min(64 if x.element_size() == 2 else 32, power_of_two(dim)), OTHERS=others,
            PRECISION=precision(x), num_warps=4, num_stages=3,
        )  # fmt: skip
    return best, column


@triton.jit
def _merge(x, assign, weights, out, N, d, stride_span, stride_row, stride_dim, BN: tl.constexpr, BD: tl.constexpr):
    token, span = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x += span * stride_span
    dims = tl.program_id(2) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    members = 0
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        mine = tl.load(assign + span * N + n, mask=n < N, other=-1) == token
        left = tl.sum(mine.to(tl.int32), 0)
        members += left
        last = -1
        while left > 0:
            last = tl.min(tl.where(mine & (n > last), n, N - 1), 0)
            row = tl.load(x + last.to(tl.int64) * stride_row + dims * stride_dim, mask=dims < d, other=0.0)
            total += tl.load(weights + span * N + last) * row.to(tl.float32)
            left -= 1
    if members == 0:
        own = tl.load(x + token.to(tl.int64) * stride_row + dims * stride_dim, mask=dims < d, other=0.0)
        total = own.to(tl.float32)
    tl.store(out + (span * N + token) * d + dims, total.to(out.dtype.element_ty), mask=dims < d)


def merge_tokens(x: Tensor, assign: Tensor, weights: Tensor) -> Tensor:
    """Return (S, N, D), token t the float32 sum of weight * x over the tokens assigned to it; others keep x.

    Arguments as in `ops.merge_tokens`; no gradients.
    """
    spans, width, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(1024, power_of_two(dim))
    with launching(x):
        _merge[(width, spans, triton.cdiv(dim, block))](
            x, assign.contiguous(), weights.float().contiguous(), out, width, dim, *x.stride(),
            BN=min(1024, power_of_two(width)), BD=block, num_warps=4,
        )  # fmt: skip
    return out
