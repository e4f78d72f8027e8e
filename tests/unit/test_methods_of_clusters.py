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


# PruneSID


def test_quotas_by_hand():
    """Leaders 3 1 2 of 5 1 4: one each, the other four by leaders, and the one that rounding leaves to the first."""
    leaders, members = torch.tensor([[3, 1, 2]]), torch.tensor([[5, 1, 4]])
    assert ops.group_quotas(leaders, members, torch.tensor([8]), 1).tolist() == [[4, 1, 2]]


def sid_by_loops(parts, x, score, total, groups) -> list[int]:
    """Groups, leaders and quotas as the spec words them, token by token."""
    count = len(x)
    unit = x / x.norm(dim=1, keepdim=True)
    alike = unit @ unit.T
    group = parts[:, :groups].argmax(1).tolist()
    upper = sum(float(alike[i, j]) for i in range(count) for j in range(i, count))
    if score is None:
        asked, score = total, parts[:, :groups].amax(1)
        lead, bar = 0, max(18 * total / count, 1) * upper / count**2
    else:
        asked, lead = total + 1, 1
        bar = asked / 32 * (upper - count) / (count * (count - 1) / 2)
    order, leaders, members = [], [], []
    for number in range(groups):
        mine = sorted((i for i in range(count) if group[i] == number), key=lambda i: -float(score[i]))
        first: list[int] = []
        for token in mine:
            if score[token] > 0 and all(float(alike[token, other]) <= bar for other in first):
                first.append(token)
        order.append([*first, *(token for token in mine if token not in first)])
        leaders.append(len(first))
        members.append(len(mine))
    low = [min(1, n) for n in members]
    most = [min(5 * -(-asked // 64), n, k) for n, k in zip(members, leaders, strict=True)]
    while sum(most) < min(asked, sum(members)):
        most = [min(up + 1, n) for up, n in zip(most, members, strict=True)]
    rest = max(0, asked - sum(low) - lead)
    reached = ((torch.tensor(leaders).float() / sum(leaders)).cumsum(0) * rest).round().tolist()
    steps = [int(b - a) for a, b in zip([0, *reached], reached, strict=False)]
    quota = [min(step + one, up) for step, one, up in zip(steps, low, most, strict=True)]
    for number in sorted(range(groups), key=lambda g: -leaders[g]):
        while quota[number] < most[number] and sum(quota) < rest + sum(low):
            quota[number] += 1
    return sorted(token for mine, n in zip(order, quota, strict=True) for token in mine[:n])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scored", [True, False])
def test_prunesid_is_its_loops(seed, scored):
    x, score, total = noise(60, 5, seed=seed), noise(60, seed=seed + 9).abs() + 0.1, 16
    groups = (total + int(scored)) // 4
    parts = ops.principal_parts(x[None], torch.ones(1, 60, dtype=torch.bool), groups)[0]
    variant = {"variant": "llava"} if scored else {"variant": "qwen", "features": x}
    signals = {"encoder_attention": score} | ({"encoder_states": x} if scored else {})
    choice = squeeze.choose("prunesid", signals=signals, keep=total, **variant)
    assert choice.kept.tolist() == sid_by_loops(parts, x, score if scored else None, total, groups)
    assert len(choice.kept) == total


def test_principal_parts_are_eigenvectors():
    x, there = noise(1, 20, 6), torch.ones(1, 20, dtype=torch.bool)
    z = x[0].double().sigmoid()
    z = z - z.mean(1, keepdim=True)
    u, _, _ = torch.linalg.svd(z, full_matrices=False)
    assert torch.allclose(ops.principal_parts(x, there, 4)[0], u[:, :4].abs(), atol=1e-9)
    padded = torch.cat([x, torch.ones(1, 5, 6)], 1)
    there = torch.cat([there, torch.zeros(1, 5, dtype=torch.bool)], 1)
    assert torch.allclose(ops.principal_parts(padded, there, 4)[0, :20], u[:, :4].abs(), atol=1e-9)


@pytest.mark.parametrize("keep", [1, 3, 4, 17, 39, 40])
@pytest.mark.parametrize("variant", ["llava", "qwen"])
def test_prunesid_keeps_its_budget(keep, variant):
    x, score = noise(40, 5), noise(40, seed=1).abs()
    signals = {"encoder_attention": score} | ({"encoder_states": x} if variant == "llava" else {})
    choice = squeeze.choose("prunesid", features=x, signals=signals, keep=keep, variant=variant)
    assert len(choice.kept) == keep
