"""AIM: rounds of bipartite matching in each frame, and the PageRank of attention, against literal loops."""

import math

import pytest
import torch

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.recipe.recipe import facts, load_recipe
from mllm_squeeze.reducers.needs import Projection


def walked(logits, temperature, steps, rows=None, keys=None):
    """The walk of one head by loops; logits: (n, n) in front of the mask. rows, keys: which take part."""
    n = len(logits)
    rows, keys = rows or [True] * n, keys or [True] * n
    here = [float(rows[i]) / sum(rows) for i in range(n)]
    for _ in range(steps):
        there = [0.0] * n
        for i in range(n):
            seen = [j for j in range(i + 1) if keys[j]]
            if not rows[i] or not seen:
                continue
            weights = [math.exp(float(logits[i][j]) / temperature) for j in seen]
            for j, weight in zip(seen, weights, strict=True):
                there[j] += here[i] * weight / sum(weights)
        here = there
    return here


def as_products(logits):
    """Queries and keys (1, n, H, n) whose scaled products are the logits (H, n, n)."""
    heads, n, _ = logits.shape
    return logits.permute(1, 0, 2)[None] * n**0.5, torch.eye(n)[None, :, None].expand(-1, -1, heads, -1)


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [(1, [0.6111, 0.2778, 0.1111]), (2, [0.7870, 0.1759, 0.0370]), (5, [0.9701, 0.0285, 0.0014])],
)
def test_worked_example_of_the_walk(steps, wanted):
    query, key = as_products(torch.full((1, 3, 3), 0.1))
    there = torch.ones(1, 3, dtype=torch.bool)
    found = ops.page_rank(query, key, there, there, 0.1, steps)[0]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=5e-5, rtol=0)


@pytest.mark.parametrize("block", [None, 2])
def test_the_walk_is_that_of_loops(block):
    torch.manual_seed(0)
    logits = torch.randn(4, 7, 7) / 3
    query, key = as_products(logits)
    there = torch.ones(1, 7, dtype=torch.bool)
    keys = torch.tensor([[True, True, False, True, True, False, True]])
    for allowed in (there, keys):
        heads = torch.tensor([walked(one, 0.2, 3, keys=allowed[0].tolist()) for one in logits])
        found = ops.page_rank(query, key, there, allowed, 0.2, 3, block)[0]
        torch.testing.assert_close(found, heads.square().mean(0).sqrt(), atol=1e-5, rtol=1e-4)


def test_heads_that_share_a_key_and_padding_change_nothing():
    torch.manual_seed(1)
    query, key = torch.randn(1, 6, 4, 5), torch.randn(1, 6, 2, 5)
    there = torch.ones(1, 6, dtype=torch.bool)
    alone = ops.page_rank(query, key, there, there, 0.5, 4)
    spread = ops.page_rank(query, key.repeat_interleave(2, 2), there, there, 0.5, 4)
    torch.testing.assert_close(alone, spread)
    pad = torch.full((1, 2, 4, 5), float("nan")), torch.zeros(1, 2, 2, 5)
    wide = torch.cat([torch.zeros(1, 2, dtype=torch.bool), there], 1)
    found = ops.page_rank(torch.cat([pad[0], query], 1), torch.cat([pad[1], key], 1), wide, wide, 0.5, 4)
    torch.testing.assert_close(found[:, 2:], alone)
    assert not found[:, :2].any()


def rounds_by_loops(x, keep, rounds):
    """Who goes into whom and with what part, one token after the other."""
    states = {i: x[i].double() for i in range(len(x))}
    into, part = {i: i for i in states}, dict.fromkeys(states, 1.0)
    for _ in range(rounds):
        order = sorted(states)
        even, odd = order[::2], order[1::2]
        unit = {i: states[i] / states[i].norm() for i in order}
        best = {i: max(odd, key=lambda j: (float(unit[i] @ unit[j]), -j)) for i in even} if odd else {}
        number = min(max(0, len(order) - keep), len(order) // 2)
        merged = sorted(best, key=lambda i: (-float(unit[i] @ unit[best[i]]), i))[:number]
        members = {j: [j] + [i for i in merged if best[i] == j] for j in odd}
        for j, some in members.items():
            states[j] = sum(states[i] for i in some) / len(some)
            for token, now in into.items():
                if now in some:
                    into[token], part[token] = j, part[token] / len(some)
        for i in merged:
            del states[i]
    return [into[i] for i in range(len(x))], [part[i] for i in range(len(x))], states


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 8, 11])
def test_rounds_are_those_of_loops(keep):
    torch.manual_seed(keep)
    x, mask = torch.randn(3, 11, 6), torch.ones(3, 11, dtype=torch.bool)
    mask[1, 8:] = mask[2, 1:] = False
    into, part = ops.bipartite_rounds(x, mask, torch.tensor([keep] * 3), 4)
    merged = ops.merge_tokens(x, into, part)
    for row, length in enumerate((11, 8, 1)):
        wanted, parts, states = rounds_by_loops(x[row, :length], keep, 4)
        assert into[row, :length].tolist() == wanted and (into[row, length:] == -1).all()
        torch.testing.assert_close(part[row, :length], torch.tensor(parts))
        for token, state in states.items():
            torch.testing.assert_close(merged[row, token], state.float(), atol=1e-5, rtol=1e-5)
        assert len(states) == min(length, max(keep, 1))


def test_worked_example_of_the_matching():
    angle = torch.tensor([0, 5, 40, 60, 90, 91, 150, 170]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)[None]
    into, part = ops.bipartite_rounds(x, torch.ones(1, 8, dtype=torch.bool), torch.tensor([6]), 1)
    assert into.tolist() == [[1, 1, 2, 3, 5, 5, 6, 7]]
    values = ops.merge_tokens(torch.arange(1.0, 9)[None, :, None], into, part)[0, :, 0]
    assert values[[1, 2, 3, 5, 6, 7]].tolist() == [1.5, 3, 4, 5.5, 7, 8]


@pytest.mark.parametrize(("grid", "keep", "left"), [((3, 2, 3), 9, 9), ((1, 2, 3), 2, 2), ((4, 1, 3), 2, 4)])
def test_each_frame_merges_by_itself(grid, keep, left):
    torch.manual_seed(3)
    x = torch.randn(math.prod(grid), 8)
    step = {"at": "projector", "keep": keep, "segment": "frame", "merge": "bipartite_rounds"}
    choice = squeeze.choose({"method": "m", "steps": [step]}, features=x, grid=grid, modality="video")
    places = grid[1] * grid[2]
    assert choice.assign is not None and len(choice.kept) == left
    assert all(int(to) // places == number // places for number, to in enumerate(choice.assign))


def test_the_part_takes_the_place_of_each_token_in_the_prompt():
    torch.manual_seed(4)
    logits = torch.randn(2, 9, 9)
    query, key = as_products(logits)
    step = {"at": {"layer": 2}, "keep": 3, "score": {"page_rank": {"temperature": 0.5, "steps": 2}}, "select": "top_k"}
    signals = {Projection(what, of="all", heads="each"): one[0] for what, one in (("query", query), ("key", key))}
    choice = squeeze.choose(
        {"method": "m", "steps": [step]}, features=torch.randn(5, 4), signals=signals, among=3, grid=(1, 5)
    )
    heads = torch.tensor([walked(one, 0.5, 2) for one in logits])
    best = heads.square().mean(0).sqrt()[3:8].topk(3).indices.sort().values
    assert choice.kept.tolist() == best.tolist()


def test_aim_prunes_pictures_alone():
    assert facts(load_recipe("aim"))["modalities"] == ["video"]
    assert facts(load_recipe("aim", variant="image"))["modalities"] == ["image", "video", "audio"]
    x = torch.randn(16, 8)
    assert len(squeeze.choose("aim", features=x, grid=(1, 4, 4), at="projector", variant="image").kept) == 16
    clip = squeeze.choose("aim", features=x, grid=(1, 4, 4), at="projector", modality="video")
    assert len(clip.kept) == 4
