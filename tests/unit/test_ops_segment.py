"""Sums, means and first members of groups; frames and places across frames."""

from __future__ import annotations

import torch

from mllm_squeeze import ops


def test_sums_and_means_leave_out_what_has_no_group():
    x = torch.tensor([[[1.0, 2], [3, 4], [5, 6], [float("nan")] * 2], [[1, 1], [1, 1], [1, 1], [2, 2]]])
    groups = torch.tensor([[0, 2, 0, -1], [1, 1, 1, 1]])
    assert ops.segment_sum(x, groups, 3).tolist() == [[[6, 8], [0, 0], [3, 4]], [[0, 0], [5, 5], [0, 0]]]
    assert ops.segment_mean(x, groups, 3)[0].tolist() == [[3, 4], [0, 0], [3, 4]]
    assert ops.segment_count(groups, 3).tolist() == [[2, 0, 1], [0, 4, 0]]
    assert ops.segment_sum(x[..., 0], groups, 3)[0].tolist() == [6, 0, 3]
    half = torch.ones(1, 1000).bfloat16()
    assert ops.segment_sum(half, torch.zeros(1, 1000, dtype=torch.int64), 1).tolist() == [[1000.0]]


def test_first_of_each_group():
    groups = torch.tensor([[2, 0, 2, -1, 0], [-1, 4, 4, 4, 1]])
    assert ops.segment_first(groups, 5).tolist() == [[0, 1, 0, -1, 1], [-1, 1, 1, 1, 4]]


def test_frames_are_counted_through_tiles():
    grid = torch.full((2, 4, 4), -1)
    grid[0, :3, 0] = torch.tensor([0, 1, 1])
    grid[0, :3, 1] = torch.tensor([1, 0, 2])
    grid[1, :2, 0] = 0
    grid[1, :2, 1] = torch.tensor([0, 1])
    assert ops.frame_ids(grid, [[2, 3], [2]]).tolist() == [[1, 2, 4, -1], [0, 1, -1, -1]]
    assert ops.frame_ids(torch.full((1, 2, 4), -1), [[]]).tolist() == [[-1, -1]]


def test_same_place_finds_the_token_or_says_that_there_is_none():
    cells = [(t, h, w) for t in range(2) for h in range(2) for w in range(3)]
    grid = torch.tensor([[[0, *c] for c in cells]])
    frame = grid[..., 1].clone()
    assert ops.same_place(grid, frame, frame - 1, (2, 2, 3)).tolist() == [[-1] * 6 + [0, 1, 2, 3, 4, 5]]
    frame[0, 4] = -1  # not there
    assert ops.same_place(grid, frame, frame - 1, (2, 2, 3)).tolist() == [[-1] * 6 + [0, 1, 2, 3, -1, 5]]


def test_a_separator_stands_at_no_place():
    """Rules count separators to the first frame; they must not hide what stands there first."""
    cells = [(0, 0, 0), (0, 0, 1), (-1, -1, -1), (1, 0, 0), (1, 0, 1), (-1, -1, -1)]
    grid = torch.tensor([[[0 if c[0] >= 0 else -1, *c] for c in cells]])
    frame = grid[..., 1].clamp(min=0)
    assert ops.same_place(grid, frame, frame - 1, (2, 1, 2)).tolist() == [[-1, -1, -1, 0, 1, -1]]
    assert ops.same_place(grid, frame, frame, (2, 1, 2)).tolist() == [[0, 1, -1, 3, 4, -1]]
