"""Merging: weights, sums, matching, nearest targets, density peaks."""

from __future__ import annotations

import pytest
import torch
from reference import rules
from reference.build import circle, pad

from mllm_squeeze import ops

NAN = float("nan")


def full(n, rows=1):
    return torch.ones(rows, n, dtype=torch.bool)


def test_merge_takes_the_weighted_sum_and_leaves_others_alone():
    x = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, NAN]]])
    assign = torch.tensor([[1, 1, -1, -1]])
    out = ops.merge_tokens(x, assign, torch.tensor([[0.25, 0.5, 9.0, 9.0]]))
    assert out[0, 1].tolist() == [1.25, 12.5]
    assert torch.equal(out[0, [0, 2]], x[0, [0, 2]])
    assert out[0, 3, 0] == 4


def test_merge_sums_in_float32_and_keeps_the_dtype():
    x = torch.full((1, 1000, 1), 1.0, dtype=torch.bfloat16)
    assign = torch.zeros(1, 1000, dtype=torch.int64)
    out = ops.merge_tokens(x, assign, torch.full((1, 1000), 1.0))
    assert out.dtype == torch.bfloat16
    assert out[0, 0, 0] == 1000  # bfloat16 sums stop growing at 256
    pair = torch.tensor([[[1.0], [-1.0]]], dtype=torch.bfloat16)
    out = ops.merge_tokens(pair, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[0.334, 0.333]]))
    assert out[0, 0, 0].item() == pytest.approx(0.001, rel=0.004)  # weights in bfloat16 give 0.00098


def test_gradients_reach_every_merged_token():
    x = torch.randn(1, 4, 3, requires_grad=True)
    assign = torch.tensor([[0, 0, -1, 3]])
    out = ops.merge_tokens(x, assign, ops.mean_weights(assign))
    out[0, [0, 3]].sum().backward()
    assert x.grad[0].tolist() == [[0.5] * 3, [0.5] * 3, [0.0] * 3, [1.0] * 3]


def test_weights_of_means():
    assign = torch.tensor([[0, 0, 2, 0, -1]])
    assert ops.mean_weights(assign)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1, 1 / 3, 0])
    size = torch.tensor([[2.0, 1.0, 4.0, 1.0, 7.0]])
    assert ops.mean_weights(assign, size)[0].tolist() == pytest.approx([0.5, 0.25, 1, 0.25, 0])
    assert ops.added_mean_weights(assign)[0].tolist() == pytest.approx([1, 0.5, 1, 0.5, 0])
    assert ops.merged_size(assign, size)[0].tolist() == [4, 1, 4, 1, 7]
    assert ops.is_target(assign)[0].tolist() == [True, False, True, False, False]


def test_bipartite_worked_example():
    keys = circle(0, 8, 60, 50, 120, 100)[None]
    assign = ops.bipartite_match(keys, full(6), torch.tensor([2]))
    assert assign.tolist() == [[1, 1, 3, 3, 4, 5]]
    x = torch.arange(1.0, 7.0)[None, :, None]
    merged = ops.merge_tokens(x, assign, ops.mean_weights(assign, torch.ones(1, 6)))[0, :, 0]
    assert [merged[i].item() for i in (4, 1, 3, 5)] == [5, 1.5, 3.5, 6]
    assert ops.merged_size(assign, torch.ones(1, 6))[0, [4, 1, 3, 5]].tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_bipartite_against_the_literal_rule(seed, lead):
    torch.manual_seed(seed)
    lengths, r = [1, 2, 9, 24, 23, 11], [5, 1, 3, 50, 8, 11]
    keys = pad([torch.randn(n, 6) for n in lengths], 24, NAN)
    mask = pad([torch.ones(n, dtype=torch.bool) for n in lengths], 24, False)
    assign = ops.bipartite_match(keys, mask, torch.tensor(r), lead)
    for i, n in enumerate(lengths):
        expected = rules.tome(keys[i, :n].double().tolist(), n - r[i], lead)
        assert {j: int(assign[i, j]) for j in range(n)} == expected
        assert (assign[i, n:] == -1).all()


def test_bipartite_ties_take_the_lowest_index():
    assign = ops.bipartite_match(torch.ones(1, 7, 2), full(7), torch.tensor([2]))
    assert assign.tolist() == [[1, 1, 1, 3, 4, 5, 6]]


def test_bipartite_counts_places_among_the_tokens_that_are_there():
    keys = torch.randn(1, 6, 4)
    holes = torch.tensor([[True, False, True, True, False, True]])
    assign = ops.bipartite_match(keys, holes, torch.tensor([2]))
    dense = ops.bipartite_match(keys[:, [0, 2, 3, 5]], full(4), torch.tensor([2]))
    place = torch.tensor([0, 2, 3, 5])
    assert torch.equal(assign[0, place], place[dense[0]])


def test_nearest_target_takes_the_first_on_ties():
    keys = torch.tensor([[[0.0, 0.0], [1, 0], [1, 0.1], [0, 1], [0, 1], [0, 0], [1, 1], [-1, 0]]])
    targets = torch.tensor([[False, True, False, False, True, False, False, False]])
    members = torch.tensor([[False, True, True, True, True, False, True, True]])
    assert ops.nearest_target(keys, targets, members, 2).tolist() == [[-1, 1, 1, 4, 4, -1, 1, 4]]
    assert ops.nearest_target(keys, targets & False, members, 0).tolist() == [[-1] * 8]


def test_density_peaks_worked_example():
    x = torch.tensor([[[0.0], [0.1], [5.0], [5.2]]])
    assign = ops.density_peaks(x, full(4), torch.tensor([2]))
    assert assign.tolist() == [[0, 0, 2, 2]]
    merged = ops.merge_tokens(x, assign, ops.mean_weights(assign))
    assert merged[0, [0, 2], 0].tolist() == pytest.approx([0.05, 5.1])


@pytest.mark.parametrize("seed", range(5))
def test_density_peaks_against_the_literal_rule(seed):
    torch.manual_seed(seed)
    lengths, clusters = [1, 4, 30, 21], [1, 2, 4, 1]
    x = pad([torch.randn(n, 3) * 2 for n in lengths], 30, NAN)
    mask = pad([torch.ones(n, dtype=torch.bool) for n in lengths], 30, False)
    assign = ops.density_peaks(x, mask, torch.tensor(clusters))
    for i, n in enumerate(lengths):
        assert assign[i, :n].tolist() == rules.density_peaks(x[i, :n].double().tolist(), clusters[i])
        assert (assign[i, n:] == -1).all()


def test_density_peaks_of_equal_and_of_far_tokens():
    assert ops.density_peaks(torch.ones(1, 5, 8), full(5), torch.tensor([2])).tolist() == [[0, 1, 0, 0, 0]]
    far = torch.tensor([[[0.0], [1.0], [1e4], [1.0001e4]]])  # exp(-d * d) underflows
    assert ops.density_peaks(far, full(4), torch.tensor([2])).tolist() == [[0, 0, 2, 2]]
