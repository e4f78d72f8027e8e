"""STTM: squares of a frame that are alike, merged over frames, against its loops and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.build import circle

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.layout import Tile


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def video(frames: int, height: int, width: int, seed: int = 0, spread: float = 0.6) -> torch.Tensor:
    """Return states (T, H, W, 6) that are alike near each other, on the grid and in time."""
    coarse = noise(1, -(-height // 3), -(-width // 3), 6, seed=seed)
    base = coarse.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :height, :width]
    return base + spread * noise(frames, height, width, 6, seed=seed + 100) * torch.rand(
        frames, 1, 1, 1, generator=torch.Generator().manual_seed(seed + 200)
    )


def sttm(x: torch.Tensor, **params: Any) -> Any:
    return squeeze.choose("sttm", features=x.flatten(0, 2), grid=x.shape[:3], modality="video", **params)


def blocks(side: int) -> list[list[int]]:
    rows = list(range(side))
    odd = [[rows.pop(0)]] if side % 2 else []
    return odd + [rows[n : n + 2] for n in range(0, len(rows), 2)]


def squares_by_loops(x: torch.Tensor, alike: float, skip: int) -> list[tuple[list[tuple[int, int]], torch.Tensor]]:
    """Return the cells and the mean of each token of one frame (H, W, D)."""
    pyramid = [{(y, z): ([(y, z)], x[y, z], []) for y in range(x.shape[0]) for z in range(x.shape[1])}]
    height, width = x.shape[:2]
    while min(height, width) > 2:
        up = {}
        for i, rows in enumerate(blocks(height)):
            for j, columns in enumerate(blocks(width)):
                parts = [(y, z) for y in rows for z in columns]
                cells = [cell for part in parts for cell in pyramid[-1][part][0]]
                up[i, j] = (cells, torch.stack([pyramid[-1][part][1] for part in parts]).mean(0), parts)
        pyramid.append(up)
        height, width = len(blocks(height)), len(blocks(width))
    pyramid = pyramid[: max(1, len(pyramid) - skip)]
    out = []

    def look(level: int, name: tuple[int, int]) -> None:
        cells, mean, parts = pyramid[level][name]
        values = [float(torch.cosine_similarity(mean, pyramid[level - 1][part][1], dim=0)) for part in parts]
        if level == 0 or all(value >= alike for value in values):
            out.append((cells, mean))
            return
        for part in parts:
            look(level - 1, part)

    for name in pyramid[-1]:
        look(len(pyramid) - 1, name)
    return out


def linked_by_loops(pairs: list[tuple[int, int]], count: int, early: bool) -> list[int]:
    stands = list(range(count))
    while True:
        before = list(stands)
        for a, b in pairs:
            low = min(before[a], before[b])
            stands[a], stands[b] = min(stands[a], low), min(stands[b], low)
        stands = [stands[n] for n in stands]
        if stands == ([stands[n] for n in stands] if early else before):
            return stands


def sttm_by_loops(x, alike, over_time, skip, mean, early) -> dict[int, torch.Tensor]:
    length, height, width, _ = x.shape
    nodes = []
    for t in range(length):
        for cells, state in squares_by_loops(x[t], alike, skip):
            first = min(y * width + z for y, z in cells)
            nodes.append((t * height * width + first, t, set(cells), state))
    nodes.sort(key=lambda node: node[0])
    pairs = []
    for i, (_, t, cells, state) in enumerate(nodes):
        for j, (_, later, others, other) in enumerate(nodes):
            inside = cells <= others or others <= cells
            near = float(torch.cosine_similarity(state, other, dim=0))
            if over_time is not None and later == t + 1 and inside and near >= over_time:
                pairs.append((i, j))
    rows: dict[int, list[int]] = {}
    for i, first in enumerate(linked_by_loops(pairs, len(nodes), early)):
        rows.setdefault(first, []).append(i)
    out = {}
    for first, members in rows.items():
        weight = torch.tensor([float(len(nodes[i][2])) if mean == "cells" else 1.0 for i in members])
        out[nodes[first][0]] = (torch.stack([nodes[i][3] for i in members]) * weight[:, None]).sum(0) / weight.sum()
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", [(4, 8, 8), (3, 7, 7), (3, 5, 8), (1, 6, 9), (5, 2, 7), (4, 1, 6), (2, 14, 13)])
@pytest.mark.parametrize(
    "params",
    [{}, {"skip": 0, "alike": 0.7, "over_time": 0.5}, {"mean": "cells", "links": "early"}, {"over_time": None}],
)
def test_it_is_its_loops(seed, grid, params):
    x = video(*grid, seed=seed)
    given = {"alike": 0.85, "over_time": 0.6, "skip": 1, "mean": "squares", "links": "all"} | params
    choice = sttm(x, **given)
    rows = sttm_by_loops(x, given["alike"], given["over_time"], given["skip"], given["mean"], given["links"] == "early")
    assert choice.kept.tolist() == sorted(rows)
    assert torch.allclose(choice.features, torch.stack([rows[n] for n in sorted(rows)]), atol=1e-5)


def test_by_hand():
    """One quadrant is alike, the others are split: 13 tokens of a frame, and of two equal frames as many."""
    quadrant = {True: [[0, 0], [0, 0]], False: [[0, 0], [90, 90]]}
    rows = [torch.cat([torch.tensor(quadrant[top and left]) for left in (True, False)], 1) for top in (True, False)]
    frame = circle(*torch.cat(rows).flatten().tolist()).view(4, 4, 2)
    once = sttm(frame[None], alike=0.9, over_time=0.9, skip=0)
    assert len(once.kept) == 13
    assert not {1, 4, 5} & set(once.kept.tolist())
    twice = sttm(torch.stack([frame, frame]), alike=0.9, over_time=0.9, skip=0)
    assert twice.kept.tolist() == once.kept.tolist()
    assert torch.bincount(twice.assign)[twice.kept].tolist() == [8] + [2] * 12
    assert torch.allclose(twice.features, once.features)


def test_one_unlike_part_splits_a_square():
    frame = circle(*[0] * 5, 90, *[0] * 10).view(1, 4, 4, 2)
    assert sttm(frame, alike=0.9, skip=0).kept.tolist() == [0, 1, 2, 4, 5, 8, 10]


def test_links_by_hand():
    """3 and 4 are linked with 5: all three are one, but the authors' loop ends when 3 stands for itself and 5."""
    first, second = torch.tensor([3, 4]), torch.tensor([5, 5])
    assert ops.linked_first(first, second, 7).tolist() == [0, 1, 2, 3, 3, 3, 6]
    assert ops.linked_first(first, second, 7, whole=False).tolist() == [0, 1, 2, 3, 4, 3, 6]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("early", [True, False])
def test_links_are_their_loops(seed, early):
    pairs = torch.randint(0, 40, (25, 2), generator=torch.Generator().manual_seed(seed))
    found = ops.linked_first(pairs[:, 0], pairs[:, 1], 40, not early)
    assert found.tolist() == linked_by_loops(pairs.tolist(), 40, early)


def test_long_chains_are_linked():
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert not ops.linked_first(order[:-1], order[1:], 200).any()


def test_sides():
    assert ops.quadtree_sides(13, 13, 0) == [(13, 13), (7, 7), (4, 4), (2, 2)]
    assert ops.quadtree_sides(14, 14, 1) == [(14, 14), (7, 7), (4, 4)]
    assert ops.quadtree_sides(8, 3, 0) == [(8, 3), (4, 2)]
    assert ops.quadtree_sides(2, 9, 3) == [(2, 9)]


@pytest.mark.parametrize("grid", [(5, 8, 8), (3, 7, 5), (1, 9, 9)])
def test_a_budget_is_kept_to_the_token(grid):
    x = video(*grid)
    count = grid[0] * grid[1] * grid[2]
    least = len(sttm(x, alike=-1.0, over_time=-1.0).kept)
    for keep in (least, least + 1, count // 3, count // 2, count - 1, count):
        choice = sttm(x, keep=keep)
        assert len(choice.kept) == keep
        # Each of them is a mean of what goes into it.
        total = torch.zeros(count).index_add(0, choice.assign, choice.weights)
        assert torch.allclose(total[choice.kept], torch.ones(keep))
        assert (choice.weights > 0).all()
    assert torch.equal(sttm(x, keep=count).features, x.flatten(0, 2))
    # What has no parts, in as many frames as are linked, is all that can be merged.
    assert len(sttm(x, keep=1).kept) == least


def test_free_tokens_are_what_is_least_like_its_mean():
    frame = circle(*[0] * 15, 1).view(1, 4, 4, 2)
    assert sttm(frame, keep=4, skip=0).kept.tolist() == [0, 2, 8, 10]
    assert sttm(frame, keep=5, skip=0).kept.tolist() == [0, 2, 8, 10, 15]


@pytest.mark.parametrize("x", [torch.ones(4, 4, 4, 3), torch.zeros(4, 4, 4, 3), torch.ones(1, 4, 4, 3)])
def test_of_still_videos(x):
    choice = sttm(x, skip=0, alike=0.9)
    # Black has no direction, so nothing says that it is alike.
    assert choice.kept.tolist() == ([0, 2, 8, 10] if x.any() else list(range(64)))
    assert torch.equal(choice.features, x.flatten(0, 2)[choice.kept])


def test_a_batch_is_its_singles():
    x = torch.stack([video(4, 6, 6, seed=1), video(4, 6, 6, seed=2, spread=2.0)])
    for params in ({}, {"keep": 30}):
        both = squeeze.choose("sttm", features=x.flatten(1, 3), grid=(4, 6, 6), modality="video", **params)
        for row in range(2):
            one = sttm(x[row], **params)
            assert both.kept[row].tolist() == one.kept.tolist()
            assert torch.equal(both.features[row], one.features)


def test_separators_stay_where_they_compete():
    tiles = [Tile(2, 4, 4, row_separators=1)]
    recipe = {
        "method": "squares",
        "summary": "Squares.",
        "positions": "keep",
        "params": {"ratio": None},
        "steps": [{"reducer": "square_trees", "at": "projector", "ratio": "${ratio}", "skip": 0}],
    }
    x = torch.ones(40, 3)
    choice = squeeze.choose(recipe, features=x, grid=tiles, modality="video", keep=20)
    assert len(choice.kept) == 20
    assert {n for n in range(40) if n % 5 == 4} <= set(choice.kept.tolist())


def test_it_needs_whole_frames():
    with pytest.raises(UnsupportedInputError, match="frames of one size"):
        squeeze.choose("sttm", features=noise(20, 4), modality="video")
    mask = torch.ones(1, 32, dtype=torch.bool)
    mask[0, [3, 19]] = False
    with pytest.raises(UnsupportedInputError, match="whole frames"):
        squeeze.choose("sttm", features=noise(1, 32, 4), grid=(2, 4, 4), mask=mask, modality="video")
