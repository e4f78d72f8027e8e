"""Methods for videos whose authors have published no code: worked examples by hand, and literal slow versions."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from reference.build import circle, visual_tokens

import mllm_squeeze as squeeze
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.layout import Tile
from mllm_squeeze.parts.base import Groups
from mllm_squeeze.parts.merge.row_runs import RowRuns
from mllm_squeeze.reducers.needs import EncoderStates


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned_by(*cosines: float) -> torch.Tensor:
    """Return unit vectors (len(cosines) + 1, 2) of which each has this cosine to the one before it."""
    angle = torch.tensor([1.0, *cosines], dtype=torch.float64).arccos().cumsum(0)
    return torch.stack([angle.cos(), angle.sin()], 1).float()


def whole(tokens: Any) -> Groups:
    return Groups(tokens.origin.masked_fill(~tokens.mask, -1).clamp(max=0), 1)


# DynTok


def dyntok(x: torch.Tensor, states: torch.Tensor, grid: Any, **params: Any) -> Any:
    return squeeze.choose("dyntok", features=x, signals={EncoderStates(): states}, grid=grid, **params)


def test_dyntok_by_hand():
    """Of five in a row .7 and then .65, .9 join; above .65, strictly, the third is by itself."""
    states, x = turned_by(0.7, 0.5, 0.65001, 0.9), torch.tensor([1.0, 3, 10, 12, 14])[:, None]
    choice = dyntok(x, states, (1, 5))
    assert choice.kept.tolist() == [0, 2]
    assert choice.features.flatten().tolist() == pytest.approx([2, 12])
    choice = dyntok(x, states, (1, 5), above=0.66)
    assert choice.kept.tolist() == [0, 2, 3]
    assert choice.features.flatten().tolist() == pytest.approx([2, 10, 13])
    assert dyntok(x, states, (1, 5), keep=2).kept.tolist() == [0, 2]
    assert dyntok(x, circle(0, 0, 0, 0, 0), (1, 5), above=1.0).kept.tolist() == [0, 1, 2, 3, 4], "above is strict"


def test_rows_of_dyntok_are_never_joined():
    same = torch.ones(6, 2)
    assert dyntok(same, same, (2, 3)).kept.tolist() == [0, 3]
    assert dyntok(same, same, (3, 1, 2)).kept.tolist() == [0, 2, 4]
    assert dyntok(same, same, (2, 3), keep=1).kept.tolist() == [0, 3]


def rows_by_loops(x, states, shape, above) -> tuple[list[int], list[torch.Tensor]]:
    kept, means = [], []
    for t, h in itertools.product(range(shape[0]), range(shape[1])):
        run: list[int] = []
        for n in range((t * shape[1] + h) * shape[2], (t * shape[1] + h + 1) * shape[2]):
            if run and float(torch.cosine_similarity(states[n], states[n - 1], dim=0)) > above:
                run.append(n)
                continue
            if run:
                means.append(x[run].mean(0))
            kept.append(n)
            run = [n]
        means.append(x[run].mean(0))
    return kept, means


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (3, 4, 3), (4, 1, 2)])
@pytest.mark.parametrize("above", [-1.0, 0.1, 0.6])
def test_dyntok_is_its_loops(shape, above):
    number = shape[0] * shape[1] * shape[2]
    x, states = noise(number, 5), noise(number, 3, seed=1)
    choice = dyntok(x, states, shape, above=above)
    kept, means = rows_by_loops(x, states, shape, above)
    assert choice.kept.tolist() == kept
    assert torch.allclose(choice.features, torch.stack(means), atol=1e-6)


@pytest.mark.parametrize("keep", [12, 20, 36])
def test_dyntok_joins_the_most_alike_of_a_budget(keep):
    x, states = noise(36, 5), noise(36, 3, seed=2)
    alike = torch.cosine_similarity(states[1:], states[:-1], dim=1)
    inside = [n for n in range(1, 36) if n % 3]
    joins = sorted(inside, key=lambda n: -float(alike[n - 1]))[: 36 - keep]
    assert dyntok(x, states, (3, 4, 3), keep=keep).kept.tolist() == sorted(set(range(36)) - set(joins))


def test_equal_neighbours_of_dyntok_join_from_the_first_on():
    same = torch.ones(8, 2)
    assert dyntok(same, same, (2, 4), keep=5).kept.tolist() == [0, 4, 5, 6, 7]
    assert torch.equal(dyntok(same, same, (2, 4), ratio=0).features, same)


def test_a_padded_batch_of_rows_is_its_singles_and_separators_stay():
    tiles = [(Tile(1, 4, 6),), (Tile(1, 3, 2), Tile(1, 3, 4, row_separators=1, tail=1)), (Tile(3, 2, 2),)]
    x = [noise(sum(tile.length for tile in one), 2, seed=n) for n, one in enumerate(tiles)]
    part = RowRuns(above=0.2)

    def out(rows: list[int], width: int | None = None) -> Any:
        tokens = visual_tokens([x[n] for n in rows], [1] * len(rows), tiles=[tiles[n] for n in rows], width=width)
        tokens = unasked(tokens)
        return part.pick_and_merge(tokens, whole(tokens), None, tokens.budget[:, None]).assign

    both = out([0, 1, 2], 30)
    for n, one in enumerate(x):
        assert both[n, : len(one)].tolist() == out([n])[0].tolist()
        assert bool((both[n, len(one) :] == -1).all())
    apart = [n for n, cell in enumerate([c for tile in tiles[1] for c in tile.coordinates()]) if cell[0] < 0]
    assert apart
    assert both[1, apart].tolist() == apart


def unasked(tokens: Any) -> Any:
    return dataclasses.replace(tokens, asked=False)


def test_rows_want_a_grid():
    with pytest.raises(UnsupportedInputError, match="grid of this picture is not known"):
        dyntok(noise(12, 5), noise(12, 5), None)
