"""Greedy choices: farthest points, determinants, facility location, pivots in turns."""

from __future__ import annotations

import pytest
import torch
from reference import rules
from reference.build import chosen, circle, pad, ragged

from mllm_squeeze import ops

NAN, INF = float("nan"), float("inf")


def test_farthest_point_worked_example():
    x, mask = circle(0, 10, 90, 95, 200)[None], torch.ones(1, 5, dtype=torch.bool)
    for k, expected in [(1, [4]), (2, [1, 4]), (3, [1, 3, 4]), (9, [0, 1, 2, 3, 4])]:
        assert chosen(ops.farthest_point(x, mask, torch.tensor([k]), k)) == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [1 << 27, 40])
def test_farthest_point_is_the_greedy_search(seed, limit, monkeypatch):
    from mllm_squeeze.ops import greedy

    monkeypatch.setattr(greedy, "_GRAM_LIMIT", limit)  # the low limit takes the path without the matrix of distances
    torch.manual_seed(seed)
    lengths, budgets = [1, 9, 24, 17], [3, 4, 10, 17]
    x = pad([torch.randn(n, 5) for n in lengths], 24, NAN)
    keep = ops.farthest_point(x, ragged(*lengths), torch.tensor(budgets), max(budgets))
    for i, n in enumerate(lengths):
        assert chosen(keep, i) == sorted(rules.divprune(x[i, :n].double().tolist(), budgets[i]))


def test_farthest_point_never_picks_a_duplicate_twice():
    x = torch.ones(1, 6, 3)
    keep = ops.farthest_point(x, torch.ones(1, 6, dtype=torch.bool), torch.tensor([4]), 4)
    assert chosen(keep) == [0, 1, 2, 3]


@pytest.mark.parametrize("limit", [1 << 27, 40])
def test_farthest_point_keeps_its_budget_without_numbers(limit, monkeypatch):
    from mllm_squeeze.ops import greedy

    monkeypatch.setattr(greedy, "_GRAM_LIMIT", limit)
    x = torch.randn(2, 12, 4)
    x[0, 3], x[0, 7], x[1] = NAN, INF, NAN
    keep = ops.farthest_point(x, ragged(12, 9), torch.tensor([5, 9]), 9)
    assert keep.sum(1).tolist() == [5, 9] and not keep[1, 9:].any()


def test_dpp_map_worked_example():
    # Four unit vectors; relevance 0, 1, .5, .25. The best pair by its determinant is {1, 2}.
    angles = torch.tensor([0.0, 20, 90, 100]).deg2rad()
    x = torch.stack([angles.cos(), angles.sin()], 1)[None]
    quality, mask = torch.tensor([[0.0, 1.0, 0.5, 0.25]]), torch.ones(1, 4, dtype=torch.bool)
    keep = ops.dpp_map(x, mask, torch.tensor([2]), 2, quality)
    assert keep[0].nonzero()[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_dpp_map_is_the_greedy_determinant(seed):
    torch.manual_seed(seed)
    x, quality = torch.randn(1, 9, 6), torch.rand(1, 9) + 0.2
    mask = torch.tensor([[True] * 7 + [False] * 2])
    unit = torch.nn.functional.normalize(x[0].double(), dim=1) * quality[0, :, None].double()
    kernel = unit @ unit.T
    picked = []
    for _ in range(5):
        others = [i for i in range(7) if i not in picked]
        picked.append(max(others, key=lambda i: float(kernel[[*picked, i]][:, [*picked, i]].det())))
    keep = ops.dpp_map(x, mask, torch.tensor([5]), 5, quality)
    assert keep[0].nonzero()[:, 0].tolist() == sorted(picked)


def test_dpp_map_takes_the_lowest_index_when_all_is_explained():
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 0]]])
    keep = ops.dpp_map(x, torch.ones(1, 5, dtype=torch.bool), torch.tensor([3]), 3)
    assert keep[0].tolist() == [True, True, True, False, False]


def gains(x, picked, bonus):
    """Return float64 (N,), what each token would add to the sum of likeness to the closest pick and bonus of picks."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    alike = (1 + unit @ unit.T) / 2
    covered = alike[picked].amax(0) if picked else torch.zeros(len(x))
    gain = (alike - covered).clamp(min=0).sum(1) + bonus
    gain[picked] = -INF
    return gain


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [1 << 27, 40])
def test_facility_location_is_the_greedy_search(seed, limit, monkeypatch):
    from mllm_squeeze.ops import greedy

    monkeypatch.setattr(greedy, "_GRAM_LIMIT", limit)  # the low limit takes one span at a time
    torch.manual_seed(seed)
    lengths = [1, 9, 20]
    x, bonus = pad([torch.randn(n, 5) for n in lengths], 20, NAN), torch.rand(3, 20)
    for extra in (None, bonus):
        picked = [[] for _ in lengths]
        for k in range(1, 21):
            keep = ops.facility_location(x, ragged(*lengths), torch.tensor([k, k, k]), k, extra)
            for i, n in enumerate(lengths):
                new = sorted(set(chosen(keep, i)) - set(picked[i]))
                assert len(new) == (k <= n)
                if new:
                    gain = gains(x[i, :n], picked[i], torch.zeros(n) if extra is None else extra[i, :n])
                    # Ties are common: of two tokens that are alike only to each other, either adds the same.
                    assert new == [int((gain > gain.max() - 1e-5).nonzero()[0])]
                    picked[i] += new


def test_facility_location_worked_example():
    # Three of a kind and two of another: one of each, then the lowest index, since nothing is left to gain.
    x, mask = circle(0, 0, 0, 90, 90)[None], torch.ones(1, 5, dtype=torch.bool)
    for k, expected in [(1, [0]), (2, [0, 3]), (3, [0, 1, 3]), (9, [0, 1, 2, 3, 4])]:
        assert chosen(ops.facility_location(x, mask, torch.tensor([k]), k)) == expected
    bonus = torch.tensor([[0.0, 0, 9, 0, 8]])
    assert chosen(ops.facility_location(x, mask, torch.tensor([2]), 2, bonus)) == [2, 4]


def test_pivots_in_turns_worked_example():
    # The first pivot is unlike 3 and 1, the second unlike 3 as well, but it is gone, so 0 and of two ties the lower.
    alike = torch.tensor([[[0.9, 0.1, 0.8, 0.0, 0.9], [0.2, 0.9, 0.5, 0.1, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    there = torch.tensor([[True, True, False]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    for total, expected in [(0, []), (1, [3]), (2, [0, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4])]:
        keep = ops.least_alike_in_turns(mask, [alike[:, :1], alike[:, 1:]], [there], torch.tensor([total]))
        assert chosen(keep) == expected


@pytest.mark.parametrize("seed", range(3))
def test_pivots_in_turns_are_a_search_token_by_token(seed):
    torch.manual_seed(seed)
    lengths, totals = [24, 9, 1], [11, 30, 1]
    mask, alike = ragged(*lengths), torch.randint(0, 6, (3, 4, 24)).float()
    there = torch.tensor([[True] * 4, [True, False, True, True], [True] * 4])
    keep = ops.least_alike_in_turns(mask, [alike], [there], torch.tensor(totals))
    for i, (n, total) in enumerate(zip(lengths, totals, strict=True)):
        pivots = [p for p in range(4) if there[i, p]]
        taken = []
        for turn, pivot in enumerate(pivots):
            for _ in range(total // len(pivots) + (turn < total % len(pivots))):
                left = [j for j in range(n) if j not in taken]
                taken += [min(left, key=lambda j: (float(alike[i, pivot, j]), j))] if left else []
        assert chosen(keep, i) == sorted(taken)
