"""How many tokens stay: the one place of the rounding rule, and schedules over stages. Plain Python, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence


def floor_exact(value: float) -> int:
    """Return floor(value), blind to float noise: 2.9999999999 counts as 3."""
    return math.floor(round(value, 9))


def kept_count(length: int, ratio: float | None = None, keep: int | float | None = None) -> int:
    """Return how many of `length` tokens stay: half rounds up, at least one stays, never more than there are.

    ratio: fraction removed, in [0, 1). keep: an int is the number kept, at least 1; a float the fraction kept, in
    (0, 1]. Give one of them; neither keeps all. They are taken as they are: `mllm_squeeze.amount.Amount` checks them.
    """
    if length <= 0:
        return 0
    if isinstance(keep, int):
        return min(keep, length)
    fraction = 1 - (ratio or 0.0) if keep is None else keep
    return min(length, max(1, floor_exact(length * fraction + 0.5)))


def share_counts(total: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return `total` shared in proportion to `sizes` by largest remainder, at least one and at most its size each.

    total: at least one for each size; more than all of them gives all. sizes: at least 1 each. What is left over goes
    to the largest remainders, ties to the first. Sizes whose share would be less than one get one, at the cost of the
    others.
    """
    left, open_ = min(total, sum(sizes)), list(range(len(sizes)))
    out = [1] * len(sizes)
    while True:
        whole = sum(sizes[n] for n in open_)
        few = [n for n in open_ if left * sizes[n] < whole]
        if not few:
            break
        left, open_ = left - len(few), [n for n in open_ if n not in few]
    for n in open_:
        out[n] = left * sizes[n] // whole
    rest = left - sum(out[n] for n in open_)
    for n in sorted(open_, key=lambda n: -(left * sizes[n] % whole))[:rest]:
        out[n] += 1
    return tuple(out)


def stage_fractions(kept: float, stages: int) -> tuple[float, ...]:
    """Return the kept fraction after each of `stages` cuts, geometric: kept ** (i / stages), the last exactly `kept`.

    kept: fraction left when all stages have run, in (0, 1]. Raises ValueError when it or `stages` is out of range.
    """
    if not 0 < kept <= 1 or stages < 1:
        raise ValueError(f"needs a kept fraction in (0, 1] and at least one stage; got {kept} and {stages}")
    return (*(kept ** (i / stages) for i in range(1, stages)), kept)


def stage_counts(
    length: int, stages: int, ratio: float | None = None, keep: int | float | None = None
) -> tuple[int, ...]:
    """Return the tokens left after each stage of a geometric schedule, `kept_count(length, ratio, keep)` in the end."""
    last = kept_count(length, ratio, keep)
    if length <= 0:
        return (0,) * stages
    exact = 1 - ratio if ratio is not None else keep if isinstance(keep, float) else last / length
    counts = [max(last, kept_count(length, keep=float(f))) for f in stage_fractions(exact, stages)]
    return (*counts[:-1], last)


def spread(total: int, parts: int) -> tuple[int, ...]:
    """Return `total` as `parts` whole numbers as equal as can be, the larger ones first."""
    base, rest = divmod(total, parts)
    return tuple(base + (i < rest) for i in range(parts))


def recycle_sizes(dropped: int, share: float = 0.3, per_cluster: int = 10) -> tuple[int, int]:
    """Return (candidates, clusters) that SparseVLM forms of `dropped` tokens: int(share * dropped) + 1, one per ten."""
    candidates = min(int(share * dropped) + 1, dropped)
    return candidates, min(candidates // per_cluster + 1, candidates)


def recycle_split(current: int, budget: int, share: float = 0.3, per_cluster: int = 10) -> tuple[int, int, int]:
    """Return (kept, candidates, clusters) with kept + clusters == budget, the split in which SparseVLM spends a budget.

    The paper fixes `kept` and lets the clusters come on top; this solves for `kept` (the largest that fits). Where
    even one kept token and its clusters exceed the budget, half of the budget (rounded down) goes to clusters.
    """
    if budget >= current:
        return current, 0, 0
    # kept + clusters grows by 0 or 1 with kept, so the walk down cannot jump over the budget; it is `clusters` long.
    for kept in range(budget - 1, 0, -1):
        candidates, clusters = recycle_sizes(current - kept, share, per_cluster)
        if kept + clusters == budget:
            return kept, candidates, clusters
    clusters = budget // 2
    kept = budget - clusters
    candidates = max(recycle_sizes(current - kept, share, per_cluster)[0], clusters) if clusters else 0
    return kept, candidates, clusters
