"""Facility location: each pick is the token that brings all others closest to a pick.

A step needs the gain of every token, a sum over all rows of the matrix: 33 MB for 2,880 tokens. That is work for the
whole GPU, so there is one launch per pick. Each program first finds the last pick among the block winners of the launch
before, lets it cover what it is closest to, sums the gains of its own tokens over all rows, and leaves its winner.
Nothing waits for the host. Gains are sums of integers, so no order of adding decides between equal ones.
"""

# Triton functions have no types of ours.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..score import in_grains, likeness
from . import launching, power_of_two
from .gram import gram, group
from .greedy import first_winners, last_pick, leave_winner


@triton.jit(do_not_specialize=["step"])
def _cover(
    alike, bonus, mask, count, covered_in, covered_out, winner_in, index_in, winner_out, index_out, chosen, step,
    N, blocks, BN: tl.constexpr, BI: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(1).to(tl.int64)
    pick = last_pick(winner_in, index_in, span, blocks, N, BLOCKS)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    gain = tl.load(bonus + span * N + n, mask=inside, other=0)
    for first in range(0, N, BI):
        i = first + tl.arange(0, BI)
        there = i < N
        before = tl.load(covered_in + span * N + i, mask=there, other=0)
        covered = tl.maximum(before, tl.load(alike + (span * N + pick) * N + i, mask=there, other=0))
        tl.store(covered_out + span * N + i, covered, mask=there & (tl.program_id(0) == 0))
        place = (span * N + n.to(tl.int64))[:, None] * N + i[None, :]
        rows = tl.load(alike + place, mask=inside[:, None] & there[None, :], other=0)
        gain += tl.sum(tl.maximum(rows - covered[None, :], 0).to(tl.int64), 1)
    taken = tl.load(chosen + span * N + n, mask=inside, other=1) != 0
    taken = taken | ((n == pick) & (step < tl.load(count + span)))
    tl.store(chosen + span * N + n, taken.to(tl.int8), mask=inside)
    real = tl.load(mask + span * N + n, mask=inside, other=0) != 0
    score = tl.where(real & ~taken, gain.to(tl.float64), float("-inf"))
    leave_winner(winner_out, index_out, score, span, blocks, BN)


def facility_location(x: Tensor, mask: Tensor, k: Tensor, steps: int, bonus: Tensor) -> Tensor:
    """Return bool (S, N), as `ops.facility_location`; `gram.supports(..., matrix=True)` must hold."""
    k = torch.minimum(k, mask.sum(1)).clamp(max=steps)
    parts = zip(*(t.split(group(*mask.shape)) for t in (x, mask, k, bonus)), strict=True)
    return torch.cat([_select(x, there.contiguous(), k, steps, in_grains(b)) for x, there, k, b in parts])


def _select(x: Tensor, mask: Tensor, k: Tensor, steps: int, bonus: Tensor) -> Tensor:
    width = mask.shape[1]
    alike = likeness(gram(x, mask, None, distance=False)[..., :width], mask)
    gain = (alike.sum(2) + bonus).double().masked_fill(~mask, -torch.inf)
    chosen = torch.zeros(mask.shape, dtype=torch.int8, device=x.device)
    launch(alike, bonus, mask, k, min(steps, width), gain, chosen)
    return chosen.bool()


def launch(alike: Tensor, bonus: Tensor, mask: Tensor, k: Tensor, steps: int, gain: Tensor, chosen: Tensor) -> None:
    """Pick `steps` times.

    alike: int32 (S, N, N). bonus: int64 (S, N). gain: float64 (S, N) of the first pick. chosen: int8 (S, N), zeros.
    """
    spans, width = mask.shape
    block = 16
    blocks = triton.cdiv(width, block)
    winners = first_winners(gain, block)
    covered = [torch.zeros(spans, width, dtype=torch.int32, device=mask.device) for _ in range(2)]
    with launching(alike):
        for step in range(steps):
            old, new = step % 2, 1 - step % 2
            _cover[(blocks, spans)](
                alike, bonus, mask, k, covered[old], covered[new], *winners[old], *winners[new], chosen, step,
                width, blocks, BN=block, BI=min(128, power_of_two(width)), BLOCKS=power_of_two(blocks), num_warps=4,
            )  # fmt: skip
