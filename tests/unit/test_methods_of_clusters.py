"""Methods that cluster inside the language model: worked examples by hand, and literal slow versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.build import circle

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.reducers.needs import Projection


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# PACT

QUERY = Projection("query", of="all", block="next", rope=False, heads="each")
KEY = Projection("key", of="all", block="next", rope=False, heads="each")
MOVED = Projection("key", block="next")


def pact(query: torch.Tensor, key: torch.Tensor, moved: torch.Tensor, features: torch.Tensor, **params: Any) -> Any:
    return squeeze.choose(
        "pact", features=features, signals={QUERY: query, KEY: key, MOVED: moved}, **{"among": 0, **params}
    )


def test_bounded_peaks_by_hand():
    """Ranks 1 2 4 6 5 3 0; 3 is densest, 4 is next and far from it, then 1 and 6."""
    x = circle(0, 10, 20, 30, 90, 100, 180)[None]
    centres, rank = ops.bounded_peaks(x, torch.ones(1, 7, dtype=torch.bool), 0.05, 2.0)
    assert rank[0].tolist() == [1, 2, 4, 6, 5, 3, 0]
    assert centres[0].nonzero().flatten().tolist() == [1, 3, 4, 6]


def test_pact_merges_by_hand():
    """A token at 35 degrees is near enough to the centre at 30 to be merged, one at 60 is dropped."""
    moved = circle(0, 10, 20.1, 30, 90, 100, 180, 35, 60)
    features = torch.tensor([[1.0], [2], [3], [4], [5], [6], [7], [0.5], [0.5]])
    flat = torch.zeros(9, 1, 2)
    choice = pact(flat, flat, moved, features, looked_at=7 / 9, cutoff=0.05, reach=0.075)
    assert choice.kept.tolist() == [1, 3, 4, 6]
    assert choice.assign.tolist() == [1, 1, 3, 3, 4, 4, 6, 3, -1]
    assert choice.features.flatten().tolist() == pytest.approx([1.5, 2.5, 5.5, 7.0])


def by_loops(query, key, moved, features, start, share, cutoff, reach) -> tuple[list[int], list[int]]:
    """All three steps of the paper, token by token."""
    count, heads, groups = len(features), query.shape[1], key.shape[1]
    stop = start + count
    score = torch.zeros(stop)
    for head in range(heads):
        mean = query[:stop, head].mean(0)
        logits = torch.stack([mean @ key[j, head // (heads // groups)] for j in range(stop)]) / query.shape[2] ** 0.5
        score += logits.softmax(0) / heads
    score = score[start:] * features.norm(dim=1)
    best = sorted(score.argsort(descending=True, stable=True)[: int(count * share)].tolist())
    unit = moved / moved.norm(dim=1, keepdim=True)
    far = (1 - unit @ unit.T).clamp(min=0)
    density = {i: sum(float(torch.exp(-((far[i, j] / 2) ** 2))) for j in best) for i in best}
    centres: list[int] = []
    for token in sorted(best, key=lambda i: -density[i]):
        if all(float(far[token, centre]) > cutoff for centre in centres):
            centres.append(token)
    centres.sort()
    assign = []
    for token in range(count):
        nearest = min(centres, key=lambda centre: (round(float(far[token, centre]), 6), centre))
        assign.append(nearest if token in best or float(far[token, nearest]) <= reach else -1)
    return centres, assign


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cutoff", [0.05, 0.21, 0.5])
def test_pact_is_its_loops(seed, cutoff):
    query, key, moved = noise(50, 4, 6, seed=seed), noise(50, 2, 6, seed=seed + 9), noise(40, 3, seed=seed + 20)
    features = noise(40, 5, seed=seed + 30)
    choice = pact(query, key, moved, features, among=6, cutoff=cutoff, reach=1.5 * cutoff)
    keep, assign = by_loops(query, key, moved, features, 6, 0.55, cutoff, 1.5 * cutoff)
    assert choice.kept.tolist() == keep
    assert choice.assign.tolist() == assign
    means = [features[[n for n, to in enumerate(assign) if to == k]].mean(0) for k in keep]
    assert torch.allclose(choice.features, torch.stack(means), atol=1e-5)


def test_words_behind_the_picture_do_not_matter_to_pact():
    query, key, moved, features = noise(50, 4, 6), noise(50, 2, 6, seed=1), noise(40, 3, seed=2), noise(40, 5, seed=3)
    others = torch.cat([query[:46], noise(4, 4, 6, seed=5)])
    assert pact(query, key, moved, features, among=6).kept.tolist() == (
        pact(others, key, moved, features, among=6).kept.tolist()
    )


@pytest.mark.parametrize("count", [1, 5, 12, 30, 40])
def test_pact_keeps_a_budget_that_is_asked_for(count):
    query, key, moved, features = noise(40, 4, 6), noise(40, 2, 6, seed=1), noise(40, 3, seed=2), noise(40, 5, seed=3)
    choice = pact(query, key, moved, features, keep=count)
    assert len(choice.kept) == count
    if count == 40:
        assert torch.equal(choice.features, features)


def test_pact_takes_a_batch_as_singles():
    query, key = noise(2, 40, 4, 6), noise(2, 40, 2, 6, seed=1)
    moved, features = noise(2, 40, 3, seed=2), noise(2, 40, 5, seed=3)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 28:] = False
    both = pact(query, key, moved, features, mask=mask)
    for row, width in ((0, 40), (1, 28)):
        one = pact(query[row, :width], key[row, :width], moved[row, :width], features[row, :width])
        assert both.kept[row].tolist() == one.kept.tolist()
        assert torch.allclose(both.features[row], one.features, atol=1e-6)
