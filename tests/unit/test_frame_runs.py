"""FrameFusion: tokens that join those before them over several cuts, against its loops and by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.layout import Tile
from mllm_squeeze.reducers.base import Reduction, Signals, VisualTokens
from mllm_squeeze.reducers.frame_runs import FrameRuns, share_to_remove
from mllm_squeeze.reducers.needs import Attention, Features


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(x, origin, seen, places, history, budget=None, frames=99) -> VisualTokens:
    """Return what a cut sees: x (n, D) of the tokens with these places in the video."""
    count = len(origin)
    origin = torch.tensor(origin)
    return VisualTokens(
        mask=torch.ones(1, count, dtype=torch.bool),
        budget=torch.tensor([budget or count]),
        counts=(budget or count,),
        grid=torch.stack([origin * 0, origin // places, origin * 0, origin % places], 1)[None],
        origin=origin[None],
        lengths=(history[0],),
        current=(count,),
        tiles=((Tile(frames, 1, places),),),
        signals=Signals({Features(): x[None], Attention(): seen[None]}),
        asked=budget is not None,
        history=(tuple(history),) if len(history) > 1 else (),
    )


@pytest.mark.parametrize(
    ("removed", "wanted"),
    [((), 0.7), ((0.5,), 0.41481481), ((0.5, 0.2), 0.27884615), ((0.05,), 0.70955166), ((0.9,), 0.0)],
)
def test_shares_by_hand(removed, wanted):
    assert share_to_remove(removed, 28, 0.3) == pytest.approx(wanted)


def test_a_cost_that_is_spent_leaves_nothing():
    assert share_to_remove((0.0,) * 9, 28, 0.3) == 1.0
    x, seen = torch.eye(8), torch.arange(8.0)
    reduction = FrameRuns().reduce(given(x, range(8), seen, 2, [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]))
    assert int(reduction.keep.sum()) == 8  # it was done nine cuts ago
    reduction = FrameRuns(enough=0.0, cost=0.01).reduce(given(x, range(8), seen, 8, [8, 8]))
    assert reduction.keep[0].nonzero().flatten().tolist() == list(range(8))


def test_the_cost_is_of_the_layers_of_the_model():
    """One layer is paid in full: 7.4 are left for 27 others of 28, which is 11 of 40 tokens, and 2 for 9 of 10."""
    x, seen = noise(40, 4), noise(40, seed=1).abs()
    tokens = given(x, range(40), seen, 40, [40, 40])
    for depth, kept in ((0, 11), (28, 11), (10, 9)):
        found = FrameRuns().reduce(replace(tokens, depth=depth))
        assert int(found.keep.sum()) == kept
    assert int(FrameRuns(layers=10).reduce(replace(tokens, depth=28)).keep.sum()) == 9


def test_a_run_by_hand():
    """One place, four frames: the second and third are joined to the first, 1, 1 and 3 are 5 / 3."""
    joins = torch.tensor([[False, True, True, False]])
    place = torch.zeros(1, 4, dtype=torch.int64)
    assign = ops.joined_to_before(joins, place, torch.ones(1, 4, dtype=torch.bool))
    assert assign.tolist() == [[0, 0, 0, 3]]
    states = Reduction(~joins, assign).states(torch.tensor([[[1.0], [1.0], [3.0], [10.0]]]))
    assert states[0, [0, 3], 0].tolist() == pytest.approx([5 / 3, 10])


@pytest.mark.parametrize("seed", range(4))
def test_ops_are_their_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    x, mask = noise(3, 30, 4, seed=seed), torch.rand(3, 30, generator=generator) < 0.8
    place = torch.randint(0, 6, (3, 30), generator=generator)
    x[~mask] = float("nan")
    alike = ops.likeness_before(x, place, mask)
    wanted, bar = torch.full((3, 30), -2.0), 0.2
    into = torch.full((3, 30), -1)
    for row in range(3):
        for n in mask[row].nonzero().flatten().tolist():
            before = [m for m in range(n) if mask[row, m] and place[row, m] == place[row, n]]
            if before:
                wanted[row, n] = torch.cosine_similarity(x[row, n], x[row, before[-1]], dim=0)
            into[row, n] = into[row, before[-1]] if wanted[row, n] >= bar else n
    assert torch.allclose(alike.masked_fill(~mask, -2), wanted, atol=1e-6)
    assert torch.equal(ops.joined_to_before((alike >= bar) & mask, place, mask), into)


def by_loops(x, seen, places, cost, bar, enough, layers, last) -> list[list[int]]:
    """Return who is left behind each cut, of states (L, N, D) and attention (L, N) of each layer."""
    left, shares, merging, done = list(range(x.shape[1])), [], True, False
    out, states = [], x[0]
    for layer in range(len(x)):
        # What the layers between two cuts do is a step of noise.
        states = states + x[layer] * (layer > 0)
        there, used = 1.0, 0.0
        for share in shares:
            there *= 1 - share
            used += there
        quota = 1 - (layers * cost - used) / ((layers - len(shares)) * there)
        quota = 0.0 if quota < 0 else quota
        if done:
            out.append(left)
            continue
        count = len(left)
        joins: list[int] = []
        if merging:
            before = {n: [m for m in left if m < n and m % places == n % places] for n in left}
            cosine = {
                n: float(torch.cosine_similarity(states[n], states[b[-1]], dim=0)) for n, b in before.items() if b
            }
            joins = [n for n in cosine if cosine[n] >= bar]
            if len(joins) / count >= quota:
                joins = sorted(joins, key=lambda n: (-cosine[n], n))[: int(quota * count)]
                done = True
            elif len(joins) / count < enough:
                merging = False
            runs: dict[int, list[int]] = {}
            target = -1
            for n in sorted(left, key=lambda n: (n % places, n)):
                target = target if n in joins else n
                runs.setdefault(target, []).append(n)
            states = states.clone()
            for target, members in runs.items():
                states[target] = states[members].mean(0)
            left = sorted(runs)
            if last and layer == len(x) - 1 and not done:
                keep = count - int(quota * count)
                left = sorted(sorted(left, key=lambda n: (-float(seen[layer, n]), n))[:keep])
        else:
            keep = round(count * (1 - quota))
            left = sorted(sorted(left, key=lambda n: (-float(seen[layer, n]), n))[:keep])
            done = True
        shares.append(1 - len(left) / count)
        out.append(left)
    return out


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("still", [0.05, 0.5, 0.9, 2.0])
@pytest.mark.parametrize("cuts", [2, 5])
def test_it_is_its_loops(seed, still, cuts):
    places, frames = 7, 9
    base = noise(1, places, 5, seed=seed) + still * noise(frames, places, 5, seed=seed + 50)
    x = torch.cat([base.flatten(0, 1)[None], 0.1 * noise(cuts - 1, frames * places, 5, seed=seed + 90)])
    seen = noise(cuts, frames * places, seed=seed + 70).abs()
    wanted = by_loops(x, seen, places, 0.3, 0.6, 0.1, 28, last=True)
    left, states, history = list(range(frames * places)), x[0], [frames * places]
    for layer in range(cuts):
        states = states + x[layer] * (layer > 0)
        rule = FrameRuns(last=layer == cuts - 1)
        reduction = rule.reduce(given(states[left], left, seen[layer, left], places, history))
        merged = reduction.states(states[left][None])[0]
        states = states.clone()
        states[left] = merged
        left = [n for n, kept in zip(left, reduction.keep[0].tolist(), strict=True) if kept]
        history.append(len(left))
        assert left == wanted[layer]


@pytest.mark.parametrize("budget", [1, 5, 20, 39, 40])
@pytest.mark.parametrize("history", [[40], [80, 40], [42, 40], [40, 40]])
def test_the_last_cut_keeps_a_budget_to_the_token(budget, history):
    x = noise(1, 8, 6).expand(5, -1, -1) + 0.4 * noise(5, 8, 6, seed=1)
    tokens = given(x.flatten(0, 1), range(40), noise(40, seed=2).abs(), 8, history, budget)
    reduction = FrameRuns(last=True).reduce(tokens)
    assert int(reduction.keep.sum()) == budget
    assert reduction.keep.gather(1, reduction.assign.clamp(min=0))[reduction.assign >= 0].all()
    merges = (reduction.assign >= 0).sum() > budget
    # Merging had ended, where so few could be joined.
    assert not merges or history in ([40], [80, 40])


def test_of_a_still_video_the_first_frame_stays():
    x = noise(1, 6, 4).expand(20, -1, -1)
    reduction = FrameRuns(cost=0.05).reduce(given(x.flatten(0, 1), range(120), torch.ones(120), 6, [120]))
    assert reduction.keep[0].nonzero().flatten().tolist() == list(range(6))
    once = FrameRuns(cost=0.5).reduce(given(x.flatten(0, 1), range(120), torch.ones(120), 6, [120]))
    assert int(once.keep.sum()) == 60
    # All are as alike, so the earliest of all join first.
    assert torch.equal(
        once.keep,
        FrameRuns(cost=0.5, last=True).reduce(given(x.flatten(0, 1), range(120), torch.ones(120), 6, [120])).keep,
    )


def test_what_stays_beside_does_not_count():
    """Two separators are in the history, and not among the tokens."""
    x, seen = noise(30, 5), noise(30, seed=1).abs()
    plain = given(x, range(30), seen, 6, [60, 31, 30])
    beside = replace(plain, history=((62, 33, 32),))
    assert torch.equal(FrameRuns().reduce(plain).keep, FrameRuns().reduce(beside).keep)
    assert int(FrameRuns().reduce(plain).keep.sum()) < 30


def test_it_needs_frames():
    signals: dict[Any, torch.Tensor] = {"attention": torch.ones(20)}
    with pytest.raises(UnsupportedInputError, match="frames of one size"):
        squeeze.choose("framefusion", at="layer 0.25", features=noise(20, 4), signals=signals, modality="video")
