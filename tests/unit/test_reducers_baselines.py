"""Random subset, even sample, average pooling: worked examples of the spec and literal rules."""

from __future__ import annotations

import pytest
import torch
from reference import rules
from reference.build import chosen, visual_tokens
from reference.methods import average_pool, random_subset, uniform_stride

from mllm_squeeze import ops
from mllm_squeeze.layout import Tile


def ramp(n):
    return torch.arange(float(n))[:, None]


def pooled(tokens, reduction, row=0):
    out = ops.merge_tokens(tokens.features, reduction.assign, ops.mean_weights(reduction.assign))
    return out[row, chosen(reduction.keep, row), 0].tolist()


def test_random_is_the_same_for_a_seed_and_a_length():
    lengths, budgets = [20, 9, 20, 20], [5, 4, 5, 7]
    tokens = visual_tokens([torch.randn(n, 2) for n in lengths], budgets)
    keep = random_subset(seed=3).reduce(tokens).keep
    assert keep.sum(1).tolist() == budgets
    assert torch.equal(keep[0], keep[2])
    assert set(chosen(keep, 0)) < set(chosen(keep, 3))
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(keep, random_subset(seed=3).reduce(tokens).keep)
    assert not torch.equal(keep, random_subset(seed=4).reduce(tokens).keep)


def test_random_is_uniform():
    tokens = visual_tokens([torch.randn(10, 2)], [3])
    hits = sum(random_subset(seed=s).reduce(tokens).keep[0].float() for s in range(2000)) / 2000
    assert (hits - 0.3).abs().max() < 0.05


def test_uniform_worked_example():
    tokens = visual_tokens([ramp(10), ramp(3)], [4, 2])
    assert [chosen(uniform_stride().reduce(tokens).keep, i) for i in range(2)] == [[0, 2, 5, 7], [0, 1]]


def test_uniform_samples_rows_and_columns_of_a_whole_rectangle():
    tokens = visual_tokens([ramp(16), ramp(16), ramp(20)], [4, 4, 4], tiles=[(Tile(1, 4, 4),), (), (Tile(1, 4, 4, 1),)])
    keep = uniform_stride().reduce(tokens).keep
    assert chosen(keep) == [5, 7, 13, 15]
    assert chosen(keep, 1) == [0, 4, 8, 12]
    assert chosen(keep, 2) == [0, 5, 10, 15]
    assert chosen(uniform_stride(grid=False).reduce(tokens).keep) == [0, 4, 8, 12]


def test_uniform_fills_the_budget_and_spreads_over_frames():
    tokens = visual_tokens([ramp(24), ramp(24)], [10, 23], tiles=[(Tile(2, 3, 4),), (Tile(4, 2, 3),)])
    keep = uniform_stride().reduce(tokens).keep
    assert keep.sum(1).tolist() == [10, 23]
    assert keep[0, :12].sum() == keep[0, 12:].sum() == 5


def test_avgpool_worked_example():
    tokens = visual_tokens([ramp(16)], [4], tiles=[(Tile(1, 4, 4),)])
    reduction = average_pool().reduce(tokens)
    assert chosen(reduction.keep) == [0, 2, 8, 10]
    assert pooled(tokens, reduction) == [2.5, 4.5, 10.5, 12.5]


def test_avgpool_is_nested():
    def pool(x, side, to):
        tokens = visual_tokens([x], [to * to], tiles=[(Tile(1, side, side),)])
        return torch.tensor(pooled(tokens, average_pool().reduce(tokens)))[:, None]

    x = torch.randn(24 * 24, 1)
    torch.testing.assert_close(pool(pool(x, 24, 12), 12, 6), pool(x, 24, 6))
    expected = torch.nn.functional.avg_pool2d(x.view(1, 24, 24), 4).flatten()[:, None]
    torch.testing.assert_close(pool(x, 24, 6), expected)


@pytest.mark.parametrize("seed", range(3))
def test_avgpool_against_the_literal_windows(seed):
    torch.manual_seed(seed)
    tiles = [
        (Tile(1, 5, 7),),
        (Tile(3, 4, 4),),
        (Tile(1, 2, 3, 1), Tile(1, 6, 4, 1, tail=1)),
        (Tile(2, 1, 5),),
        (Tile(3, 6, 2),),
        (Tile(2, 2, 3), Tile(2, 4, 4)),
    ]
    budgets = [11, 20, 13, 1, 20, 20]
    features = [torch.randn(sum(t.length for t in row), 3) for row in tiles]
    tokens = visual_tokens(features, budgets, tiles=tiles)
    reduction = average_pool().reduce(tokens)
    out = ops.merge_tokens(tokens.features, reduction.assign, ops.mean_weights(reduction.assign))
    for i, row in enumerate(tiles):
        cells, begin, expected = sum(t.cells for t in row), 0, {}
        for tile in row:
            share = budgets[i] * tile.cells // cells // tile.frames
            high, wide = ops.pooled_size(tile.height, tile.width, share)
            index = [begin + j for j, c in enumerate(tile.coordinates()) if c[0] >= 0]
            for t in range(tile.frames):
                frame = index[t * tile.height * tile.width :]
                for window in rules.windows(tile.height, tile.width, high, wide):
                    members = [frame[c] for c in window]
                    expected[members[0]] = rules.mean(features[i][members].tolist())
            begin += tile.length
        assert chosen(reduction.keep, i) == sorted(expected)
        assert len(expected) == average_pool().count(begin, budgets[i], row)
        for survivor, value in expected.items():
            assert out[i, survivor].tolist() == pytest.approx(value, abs=1e-6)


def test_avgpool_drops_separators_and_meets_the_budget_from_below():
    tile = (Tile(1, 24, 24, 1),)
    for budget in range(1, 601, 7):
        count = average_pool().count(600, budget, tile)
        assert 1 <= count <= budget
        assert count >= min(0.75 * budget, budget - 3)
    assert average_pool().count(600, 600, tile) == 600
    assert average_pool().count(48, 2, (Tile(12, 2, 2),)) == 12  # a token for each frame


def test_avgpool_pools_runs_where_the_grid_is_not_whole():
    tokens = visual_tokens([ramp(10), ramp(7)], [4, 3], tiles=[(), (Tile(1, 4, 4),)])
    reduction = average_pool().reduce(tokens)
    assert pooled(tokens, reduction) == [1.0, 3.5, 6.0, 8.5]
    assert reduction.keep.sum(1).tolist() == [4, 3]
    assert average_pool().count(7, 3, (Tile(1, 4, 4),)) == 3
