"""Rules for whole spans, run on each group: a group becomes a row of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mllm_squeeze import ops
from mllm_squeeze.parts.base import Groups
from mllm_squeeze.reducers.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The groups of all spans, one row each.

    mask: bool (R, M). limit: int64 (R,). steps: the largest limit, on the host. take: (S, N, ...) to (R, M, ...).
    """

    mask: Tensor
    limit: Tensor
    steps: int
    take: Callable[[Tensor], Tensor]


def worth(score: Tensor) -> Tensor:
    """Return float32 (S, N), a score as a weight: what is negative, no number or -inf counts as 0.

    A span in which nothing counts then has weights of 1: all its tokens count alike.
    """
    weight = score.detach().float().nan_to_num(0, neginf=0).clamp(min=0)
    return weight.masked_fill((weight == 0).all(1, keepdim=True), 1)


def pick_in_rows(
    tokens: VisualTokens, groups: Groups, limit: Tensor, pick: Callable[[Rows], Tensor], among: Tensor | None = None
) -> Tensor:
    """Return bool (S, N), what `pick` picks (bool (R, M)) of each group.

    limit: int64 (S, groups.count). among: bool (S, N), the tokens to be had, None for all.
    """
    label = groups.label if among is None else groups.label.masked_fill(~among, -1)
    width, most = label.shape[1], max(tokens.counts, default=0)
    if groups.count == 1:
        return pick(Rows(label >= 0, limit[:, 0], min(most, width), lambda x: x))
    slots = min(groups.widest or width, width)
    index, filled = ops.group_rows(label, groups.count, slots)

    def take(x: Tensor) -> Tensor:
        return ops.take(x, index).reshape(-1, slots, *x.shape[2:])

    there = filled.reshape(-1, slots)
    picked = pick(Rows(there, limit.reshape(-1), min(most, slots), take)).reshape(index.shape)
    return ops.put_back(label < -1, index, filled, picked)
