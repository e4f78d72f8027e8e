"""Even samples and the sizes of pooled grids."""

from __future__ import annotations

import pytest
import torch
from reference.build import chosen

from mllm_squeeze import ops


def test_stride_worked_example():
    keep = ops.stride_mask(torch.ones(1, 10, dtype=torch.bool), torch.tensor([4]))
    assert chosen(keep) == [0, 2, 5, 7]


@pytest.mark.parametrize("n", [1, 2, 7, 10, 24, 33])
def test_stride_is_the_formula(n):
    mask = torch.zeros(n + 1, 40, dtype=torch.bool)
    place = torch.randperm(40)[:n].sort().values
    mask[:, place] = True
    k = torch.arange(1, n + 2)
    keep = ops.stride_mask(mask, k)
    for row in range(n + 1):
        budget = min(int(k[row]), n)
        assert chosen(keep, row) == place[[i * n // budget for i in range(budget)]].tolist()


@pytest.mark.parametrize(
    ("height", "width", "cells", "size"),
    [(24, 24, 64, (8, 8)), (24, 24, 10, (3, 3)), (24, 48, 8, (2, 4)), (4, 4, 1, (1, 1)), (2, 2, 9, (2, 2))],
)
def test_grid_size_keeps_the_aspect(height, width, cells, size):
    assert ops.grid_size(height, width, cells) == size


@pytest.mark.parametrize(
    ("height", "width", "cells", "size"),
    [
        (24, 24, 144, (12, 12)),
        (24, 24, 64, (8, 8)),
        (24, 24, 288, (16, 18)),
        (24, 24, 576, (24, 24)),
        (27, 27, 196, (14, 14)),
        (4, 4, 4, (2, 2)),
        (4, 4, 8, (2, 4)),
        (12, 24, 72, (6, 12)),
        (24, 24, 1, (1, 1)),
        (24, 24, 0, (1, 1)),
    ],
)
def test_pooled_size(height, width, cells, size):
    assert ops.pooled_size(height, width, cells) == size


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 5, 7), (1, 1, 9), (3, 4, 6), (7, 2, 2)])
def test_grid_pattern_meets_every_budget_and_spreads_over_frames(shape):
    frames, height, width = shape
    for k in range(1, frames * height * width + 2):
        pattern = ops.grid_pattern(*shape, k).view(frames, -1)
        assert pattern.sum() == min(k, pattern.numel())
        per_frame = pattern.sum(1)
        assert per_frame.max() - per_frame.min() <= 1


def test_grid_pattern_is_a_centred_grid():
    rows = ops.grid_pattern(1, 4, 4, 4).view(4, 4).nonzero().tolist()
    assert rows == [[1, 1], [1, 3], [3, 1], [3, 3]]
    stripes = ops.stride_mask(torch.ones(1, 16, dtype=torch.bool), torch.tensor([4]))[0].view(4, 4)
    assert stripes.any(0).sum() == 1  # the 1-D rule picks one column, which is why the grid rule is there
