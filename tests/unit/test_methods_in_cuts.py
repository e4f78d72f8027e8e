"""Methods that cut several times inside the language model: worked examples by hand, and literal slow versions."""

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


# BTP


def balanced(score: torch.Tensor, features: torch.Tensor, count: int, grid: Any = None, **params: Any) -> Any:
    step = {"at": {"layer": 1}, "keep": count, "score": {"attention": "last"}, "select": {"balanced": params}}
    recipe = {"method": "balanced", "steps": [step]}
    return squeeze.choose(recipe, features=features, signals={"attention": score}, grid=grid)


def test_cells_far_apart_by_hand():
    assert ops.spread_cells(4, 4, 5) == (0, 15, 3, 9, 6)
    assert ops.spread_cells(2, 2, 9) == (0, 3, 1, 2)


def test_early_tokens_come_first_by_hand():
    """Four of the enlarged set are {5 6 2 7}; of these 2 stands early, then come 5 and 6."""
    score = torch.tensor([0.01, 0.05, 0.20, 0.02, 0.03, 0.30, 0.25, 0.14])
    # Of a budget of 4, three are 0.75; the fourth is the farthest, here the first, as all features are alike.
    choice = balanced(score, torch.ones(8, 2), 4, best=0.75, enlarged=1.5)
    assert choice.kept.tolist() == [0, 2, 5, 6]
    assert balanced(score, torch.ones(8, 2), 4, best=0.5, enlarged=2.0).kept.tolist()[-2:] == [2, 5]


def test_the_rest_is_filled_up_by_hand():
    """From 0 the farthest is at 180 degrees, then the one at 90, whose nearest distance is 1."""
    x = circle(0, 10, 90, 100, 180, 265)
    score = torch.tensor([1.0, 0, 0, 0, 0, 0])
    assert balanced(score, x, 3, best=0.34).kept.tolist() == [0, 2, 4]


def in_loops(score, x, count, shape, best, enlarged, early, different, apart) -> list[int]:
    unit = torch.nn.functional.normalize(x, dim=1)

    def farthest(keep: list[int], number: int) -> list[int]:
        keep = list(keep)
        while len(keep) < number:
            if keep:
                far = (1 - unit @ unit[keep].T).amin(1)
                far[keep] = -1
            else:
                pairs = 1 - unit @ unit.T
                far = pairs.masked_fill(torch.eye(len(x), dtype=torch.bool), torch.inf).amin(1)
            keep.append(int(far.argmax()))
        return keep

    number = int(best * count)
    order = score.argsort(descending=True, stable=True)[: int(number * enlarged)].tolist()
    first = [*(t for t in order if t < count), *(t for t in order if t >= count)][:number] if early else order
    width, cells = shape[1], [0]
    while len(cells) < int(count * apart):
        steps = [min(abs(c // width - p // width) + abs(c % width - p % width) for p in cells) for c in range(len(x))]
        cells.append(max(range(len(x)), key=lambda c: (steps[c], -c)))
    cells, other = cells if apart else [], farthest([], int(different * count))
    union = sorted({*first, *cells, *other}, key=lambda t: (t not in first, t not in cells, t not in other, t))
    return sorted(farthest(union[:count], count))


STAGES = [
    dict(best=0.3, enlarged=3.7, early=True, different=0.3, apart=0.5),
    dict(best=0.9, enlarged=1.5, early=True, different=0.1, apart=0.0),
    dict(best=1.0, enlarged=1.2, early=True, different=0.0, apart=0.0),
    dict(best=0.1, enlarged=1.2, early=False, different=0.0, apart=0.0),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [20, 41])
def test_btp_is_its_loops(seed, stage, count):
    score, x = noise(80, seed=seed), noise(80, 6, seed=seed + 9)
    choice = balanced(score, x, count, (8, 10), **stage)
    assert choice.kept.tolist() == in_loops(score, x, count, (8, 10), **stage)
    assert len(choice.kept) == count


def test_btp_takes_a_batch_as_singles():
    score, x = noise(2, 48), noise(2, 48, 6, seed=1)
    both = balanced(score, x, 20, (6, 8), **STAGES[0]).kept
    for row in range(2):
        assert both[row].tolist() == balanced(score[row], x[row], 20, (6, 8), **STAGES[0]).kept.tolist()


def test_tokens_that_are_far_apart_are_shared_over_tiles_and_frames():
    tiles = [Tile(2, 3, 4), Tile(1, 3, 4)]
    choice = balanced(torch.zeros(36), torch.ones(36, 2), 12, tiles, best=0.0, apart=1.0)
    corners = ops.spread_cells(3, 4, 4)
    assert choice.kept.tolist() == sorted(cell + 12 * frame for frame in range(3) for cell in corners)


def test_tokens_that_are_far_apart_need_a_grid():
    with pytest.raises(UnsupportedInputError, match="Leave out apart"):
        balanced(torch.zeros(36), torch.ones(36, 2), 12, apart=0.5)
