"""Pivots take turns: each takes so many of the tokens least like it that are still to be had.

One program per span holds all tokens in registers and walks the pivots. A turn needs no sorting: the value of the last
token that is taken is found bit by bit, 32 counts whatever the number of tokens, and ties at it go by index.
"""

# Triton functions have no types of ours.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, power_of_two
from .gram import WIDTH_LIMIT

# The lowest finite float32, which stands for NaN as well.
LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
# Below the rank of every float.
NOTHING: tl.constexpr = tl.constexpr(-(1 << 31))


@triton.jit
def _ordered(value):
    """Return int32 in the order of the float32 values."""
    value = tl.where(value == value, tl.maximum(value, LOWEST), LOWEST)
    # -0 and 0 are equal.
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _take_turns(likeness, quota, mask, chosen, N, pivots, BN: tl.constexpr):
    span = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    inside = n < N
    free = tl.load(mask + span * N + n, mask=inside, other=0) != 0
    taken = n < 0
    one = tl.full((), 1, tl.int32)
    for pivot in range(0, pivots):
        wanted = tl.load(quota + span * pivots + pivot)
        row = tl.load(likeness + (span * pivots + pivot) * N + n, mask=inside, other=0.0)
        rank = tl.where(free & ~taken, _ordered(-row), NOTHING)
        # The largest rank that at least `wanted` tokens reach; NOTHING where there are not that many.
        limit = tl.full((), NOTHING, tl.int32)
        for bit in range(0, 32):
            higher = limit ^ (one << (31 - bit))
            reached = tl.sum((rank >= higher).to(tl.int32), 0)
            limit = tl.where(reached >= wanted, higher, limit)
        above, equal = rank > limit, (rank == limit) & (rank > NOTHING)
        room = wanted - tl.sum(above.to(tl.int32), 0)
        taken = taken | above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    tl.store(chosen + span * N + n, taken.to(tl.int8), mask=inside)


def supports(likeness: Tensor) -> bool:
    """Return whether the kernel takes these shapes (S, P, N)."""
    return likeness.dtype == torch.float32 and 0 < likeness.shape[2] <= WIDTH_LIMIT and likeness.shape[1] > 0


def least_alike_in_turns(mask: Tensor, likeness: Tensor, quota: Tensor) -> Tensor:
    """Return bool (S, N), as `ops.least_alike_in_turns`. likeness: (S, P, N). quota: int64 (S, P)."""
    spans, pivots, width = likeness.shape
    chosen = torch.empty(spans, width, dtype=torch.int8, device=mask.device)
    block = power_of_two(width)
    with launching(likeness):
        _take_turns[(spans,)](
            likeness.contiguous(), quota.contiguous(), mask.contiguous(), chosen, width, pivots, BN=block,
            num_warps=min(32, max(1, block // 256)),
        )  # fmt: skip
    return chosen.bool()
