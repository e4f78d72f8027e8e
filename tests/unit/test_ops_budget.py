"""Counts: the rounding rule, schedules, and the split of SparseVLM's budget."""

from __future__ import annotations

import itertools
import random

import pytest

from mllm_squeeze import ops


@pytest.mark.parametrize(
    ("length", "ratio", "expected"),
    [
        (10, 0.5, 5),
        (10, 0.9, 1),
        (10, 0.95, 1),
        (10, 0.85, 2),
        (5, 0.5, 3),
        (7, 0.5, 4),
        (576, 0.0, 576),
        (576, 0.81, 109),
        (576, 0.778, 128),
        (576, 0.889, 64),
        (576, 0.902, 56),
        (576, 0.875, 72),
        (1, 0.99, 1),
        (0, 0.5, 0),
        (30, 0.95, 2),
        (3, 0.5, 2),
    ],
)
def test_ratio_rounds_half_up(length, ratio, expected):
    assert ops.kept_count(length, ratio) == expected


@pytest.mark.parametrize("length", range(1, 200))
def test_every_percentage_rounds_exactly(length):
    for percent in range(100):
        exact = (2 * length * (100 - percent) + 100) // 200  # half up in whole numbers
        assert ops.kept_count(length, percent / 100) == min(length, max(1, exact)), percent


def test_keep_is_a_number_or_a_fraction():
    assert ops.kept_count(100, keep=64) == 64
    assert ops.kept_count(50, keep=64) == 50
    assert ops.kept_count(100, keep=0.25) == 25
    assert ops.kept_count(100, keep=1.0) == 100
    assert ops.kept_count(100, keep=1) == 1
    assert ops.kept_count(100) == 100


@pytest.mark.parametrize(
    ("total", "sizes", "shares"),
    [
        (10, (5, 5), (5, 5)),
        (7, (5, 5), (4, 3)),  # a tie goes to the first
        (10, (30, 10), (8, 2)),  # 7.5 and 2.5
        (10, (31, 9), (8, 2)),  # 7.75 and 2.25
        (3, (100, 1, 1), (1, 1, 1)),
        (10, (100, 1, 1), (8, 1, 1)),
        (6, (50, 50, 1, 1), (2, 2, 1, 1)),
        (9, (2, 3), (2, 3)),
        (1, (7,), (1,)),
        (2, (1, 1), (1, 1)),
    ],
)
def test_a_total_is_shared_by_largest_remainder(total, sizes, shares):
    assert ops.share_counts(total, sizes) == shares


@pytest.mark.parametrize("seed", range(40))
def test_every_share_is_fair(seed):
    """All of it is given, nobody gets none or more than there is, and who has more tokens keeps no fewer."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, rng.choice((2, 20, 900))) for _ in range(rng.randint(1, 9))]
    for total in range(len(sizes), sum(sizes) + 2):
        shares = ops.share_counts(total, sizes)
        assert sum(shares) == min(total, sum(sizes))
        assert all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))
        for (one, size), (other, another) in itertools.combinations(zip(shares, sizes, strict=True), 2):
            assert size == another or (size < another) == (one < other) or one == other
        ample = min(total, sum(sizes)) * min(sizes) >= sum(sizes)
        exact = [total * size / sum(sizes) for size in sizes]
        assert not ample or total > sum(sizes) or all(abs(a - b) < 1 for a, b in zip(shares, exact, strict=True))


def test_stages_are_geometric_and_end_exactly():
    assert ops.stage_fractions(0.125, 3) == pytest.approx((0.5, 0.25, 0.125))
    assert ops.stage_counts(576, 3, ratio=0.875) == (288, 144, 72)
    assert ops.stage_counts(8, 2, ratio=0.75) == (4, 2)
    assert ops.stage_counts(576, 3, keep=72) == (288, 144, 72)
    assert ops.stage_counts(576, 3) == (576, 576, 576)
    assert ops.stage_counts(576, 3, ratio=0.81) == (331, 190, 109)
    for keep in range(1, 40):
        counts = ops.stage_counts(33, 3, keep=keep)
        assert list(counts) == sorted(counts, reverse=True)
        assert counts[-1] == min(keep, 33)
    with pytest.raises(ValueError, match="fraction"):
        ops.stage_fractions(0.0, 3)


def test_spread_is_even():
    assert ops.spread(10, 4) == (3, 3, 2, 2)
    assert ops.spread(3, 4) == (1, 1, 1, 0)
    assert ops.spread(368, 23) == (16,) * 23


def test_the_papers_table_of_sparsevlm():
    stages = {(300, 200, 110): (309, 204, 113), (303, 110, 36): (312, 117, 39), (66, 30, 17): (82, 32, 18)}
    for ranked, totals in stages.items():
        current = 576
        for keep, total in zip(ranked, totals, strict=True):
            kept, _, clusters = ops.recycle_split(current, total)
            assert kept + clusters == total
            assert keep <= kept <= keep + 1  # where two splits give one total, the larger kept is taken
            assert sum(ops.recycle_sizes(current - keep)[1:]) == total - keep
            current = total


def test_the_split_meets_every_budget():
    for current in [*range(1, 60), 576, 1999]:
        for budget in range(1, current + 2):
            kept, candidates, clusters = ops.recycle_split(current, budget)
            assert kept + clusters == min(budget, current)
            assert kept >= 1
            assert clusters <= candidates <= current - kept
