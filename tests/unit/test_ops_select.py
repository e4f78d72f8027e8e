"""Ranks, top-k, compaction."""

from __future__ import annotations

import pytest
import torch
from reference import rules
from reference.build import chosen, ragged

from mllm_squeeze import ops

NAN, INF = float("nan"), float("inf")


def test_top_k_breaks_ties_by_index():
    keep = ops.top_k_mask(torch.tensor([[0.2, 0.2, 0.1, 0.2]]), torch.ones(1, 4, dtype=torch.bool), torch.tensor([2]))
    assert chosen(keep) == [0, 1]


def test_top_k_has_a_k_per_row_and_never_takes_padding():
    scores = torch.tensor([[1.0, 2.0, 9.0, 9.0], [4.0, 3.0, 2.0, 1.0], [-INF, NAN, -INF, 9.0]])
    mask = ragged(2, 4, 3)
    assert [chosen(ops.top_k_mask(scores, mask, torch.tensor([1, 3, 2])), i) for i in range(3)] == [
        [1],
        [0, 1, 2],
        [0, 1],
    ]
    assert [chosen(ops.top_k_mask(scores, mask, 9), i) for i in range(3)] == [[0, 1], [0, 1, 2, 3], [0, 1, 2]]
    assert not ops.top_k_mask(scores, mask, torch.tensor([0, 0, 0])).any()


def test_nan_is_the_lowest_score():
    scores = torch.tensor([[NAN, -1e30, NAN, 5.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert ops.ranks(scores, mask).tolist() == [[2, 1, 3, 0]]
    assert chosen(ops.top_k_mask(scores, mask, 2)) == [1, 3]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_is_a_stable_sort(seed, dtype):
    torch.manual_seed(seed)
    lengths, width = [1, 7, 30, 30], 30
    scores = torch.randint(0, 6, (4, width)).to(dtype)
    k = torch.tensor([1, 3, 11, 30])
    keep = ops.top_k_mask(scores, ragged(*lengths), k)
    for i, n in enumerate(lengths):
        assert chosen(keep, i) == sorted(rules.best(scores[i].tolist(), range(n), int(k[i])))


@pytest.mark.parametrize("seed", range(4))
def test_rank_within_groups(seed):
    torch.manual_seed(seed)
    lengths = [5, 40, 33]
    mask = ragged(*lengths)
    scores = torch.randint(0, 5, mask.shape).float()
    groups = torch.randint(-1, 6, mask.shape)
    ranks = ops.rank_within(scores, groups, mask)
    for i, n in enumerate(lengths):
        for g in range(-1, 6):
            members = [j for j in range(n) if groups[i, j] == g]
            order = rules.best(scores[i].tolist(), members, n)
            assert [int(ranks[i, j]) for j in order] == list(range(len(order)))
    assert (ranks[~mask] == mask.shape[1]).all()


def test_compact_and_put_back():
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    index, filled = ops.compact_indices(mask, 3)
    assert index.tolist() == [[1, 3, 0], [0, 0, 0], [0, 1, 2]]
    assert filled.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    base = torch.zeros(3, 4, dtype=torch.int64)
    assert ops.put_back(base, index, filled, index + 10).tolist() == [[0, 11, 0, 13], [0] * 4, [10, 11, 12, 0]]
    assert ops.compact_indices(mask, 0)[0].shape == (3, 0)
    assert ops.local_index(mask).tolist() == [[-1, 0, -1, 1], [-1] * 4, [0, 1, 2, 3]]


def test_best_first_orders_and_pads():
    scores = torch.tensor([[1.0, 5.0, 5.0], [7.0, 8.0, 9.0]])
    index, filled = ops.best_first(scores, ragged(3, 1), 4)
    assert index.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0]]
    assert filled.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert ops.best_first(scores[:, :0], ragged(3, 1)[:, :0], 2)[1].tolist() == [[False, False]] * 2


def test_noise_depends_on_the_count_only():
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    noise = ops.seeded_noise(mask, (3, 5, 3), 7)
    assert torch.equal(noise[0][mask[0]], noise[2][mask[2]])
    assert not torch.equal(noise, ops.seeded_noise(mask, (3, 5, 3), 8))


def test_choices_carry_no_gradient_and_ignore_autocast():
    x = torch.randn(1, 8, 4, requires_grad=True)
    mask = torch.ones(1, 8, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similar = ops.cosine(x, x)
    assert similar.dtype == torch.float32
    assert not similar.requires_grad
    assert not ops.farthest_point(x, mask, torch.tensor([3]), 3).requires_grad
