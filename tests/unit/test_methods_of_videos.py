"""Methods for videos whose authors have published no code: worked examples by hand, and literal slow versions."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from reference.build import circle, visual_tokens

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.layout import Tile
from mllm_squeeze.parts.base import Groups
from mllm_squeeze.parts.budget.favoured import Favoured
from mllm_squeeze.parts.budget.level import Level
from mllm_squeeze.parts.merge.row_runs import RowRuns
from mllm_squeeze.parts.segment.events import Events
from mllm_squeeze.parts.segment.key_events import KeyEvents
from mllm_squeeze.parts.select.other_places import OtherPlaces
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.needs import Attention, Embedding, EncoderStates


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


# EgoPrune


def unseen(frames: torch.Tensor, shape: Any, **params: Any) -> list[int]:
    """Return what stays of frames (T, N, D) behind the first step."""
    return squeeze.choose(
        "egoprune", at="projector", features=frames.flatten(0, 1), grid=shape, modality="video", **params
    ).kept.tolist()


def test_a_pan_by_one_cell_by_hand():
    """The second frame is one cell further: two of its tokens were seen, one changed, one is new."""
    frames = torch.stack([circle(0, 30, 60, 90), circle(30, 60, 0, 45)])
    assert unseen(frames, (2, 1, 4)) == [0, 1, 2, 3, 6, 7]
    # Place by place .866 and .866 are alike too, by chance; .9 tells it from the move.
    assert unseen(frames, (2, 1, 4), alike=0.9) == [0, 1, 2, 3, 6, 7]
    assert unseen(frames, (2, 1, 4), alike=0.9, reach=0) == list(range(8))


def moves_by_loops(frames: torch.Tensor, shape: tuple[int, int], reach: int, alike: float) -> list[int]:
    height, width = shape
    unit = torch.nn.functional.normalize(frames.double(), dim=2).view(len(frames), height, width, -1)
    kept = list(range(height * width))
    steps = range(-reach, reach + 1)
    moves = sorted(itertools.product(steps, steps), key=lambda move: move[0] ** 2 + move[1] ** 2)
    for t in range(1, len(frames)):
        best, gone = -1.0, set()
        for down, across in moves:
            gain, there = 0.0, set()
            for h, w in itertools.product(range(height), range(width)):
                if 0 <= h + down < height and 0 <= w + across < width:
                    cosine = float(unit[t, h, w] @ unit[t - 1, h + down, w + across])
                    gain += max(0.0, cosine - alike)
                    there |= {h * width + w} if cosine > alike else set()
            if gain > best + 1e-9:
                best, gone = gain, there
        kept += [t * height * width + n for n in range(height * width) if n not in gone]
    return kept


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reach", [1, 2])
def test_moved_frames_are_found_by_loops(seed, reach):
    """A camera over a wide picture, and something that does not fit."""
    wide, generator = noise(12, 14, 6, seed=seed), torch.Generator().manual_seed(seed)
    places = torch.randint(0, 2 * reach, (4, 2), generator=generator).cumsum(0).clamp(max=7).tolist()
    frames = torch.stack([wide[h : h + 4, w : w + 5].flatten(0, 1) for h, w in places]) + 0.3 * noise(4, 20, 6, seed=9)
    kept = unseen(frames, (4, 4, 5), alike=0.6, reach=reach)
    assert kept == moves_by_loops(frames, (4, 5), reach, 0.6)
    assert len(kept) < 80


@pytest.mark.parametrize("frames", [torch.ones(3, 6, 2), torch.ones(1, 6, 2)])
def test_a_still_video_is_moved_by_nothing(frames):
    assert unseen(frames, (len(frames), 2, 3)) == list(range(6))


def test_of_equal_moves_none_counts():
    frames = circle(*[0] * 6, *[90] * 6)
    tokens = visual_tokens([frames], [1], tiles=[(Tile(2, 2, 3),)])
    before = ops.moved_before(frames[None], tokens.grid, tokens.grid[..., 1], (2, 2, 3), 1, 0.5)[1]
    assert before[0].tolist() == [-1] * 6 + list(range(6))


def test_moved_frames_of_a_padded_batch_are_those_of_singles():
    tiles = [(Tile(3, 2, 4),), (Tile(2, 3, 3, row_separators=1, tail=1),), (Tile(1, 1, 5),)]
    x = [noise(sum(tile.length for tile in one), 3, seed=n) for n, one in enumerate(tiles)]

    def out(rows: list[int], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = visual_tokens([x[n] for n in rows], [1] * len(rows), tiles=[tiles[n] for n in rows], width=width)
        frame = tokens.grid[..., 1]
        return ops.moved_before(tokens.features, tokens.grid, frame, (3, 3, 5), 2, 0.3)

    alike, before = out([0, 1, 2], 30)
    for n, one in enumerate(x):
        single = out([n])
        assert before[n, : len(one)].tolist() == single[1][0].tolist()
        assert torch.allclose(alike[n, : len(one)], single[0][0], atol=1e-6)
        assert bool((before[n, len(one) :] == -1).all())


def asked(frames: torch.Tensor, text: torch.Tensor, **params: Any) -> list[int]:
    """Return what stays of frames (T, N, D) behind the second step."""
    x = frames.flatten(0, 1)
    signals = {Embedding("visual", "llm"): x, Embedding("text", "llm"): text}
    grid = (len(frames), 1, frames.shape[1])
    return squeeze.choose(
        "egoprune", at="layer 0", features=x, signals=signals, grid=grid, modality="video", **params
    ).kept.tolist()


def test_marginal_relevance_by_hand():
    """At equal weights what is like the question and what is new tie, and the first one stays."""
    frame, question = circle(0, 10, 90)[None], circle(0)
    assert asked(frame, question, keep=2) == [0, 1]
    assert asked(frame, question, keep=2, weight=0.4) == [0, 2]
    # The words are one vector: two that cancel but for their sum.
    assert asked(frame, circle(40, -40), keep=1) == [0]


def relevance_by_loops(frames: torch.Tensor, text: torch.Tensor, quota: list[int], weight: float) -> list[int]:
    kept = []
    for t, frame in enumerate(frames.double()):
        unit = torch.nn.functional.normalize(frame, dim=1)
        mean = text.double().mean(0)
        relevance = unit @ (mean / mean.norm())
        picked: list[int] = []
        for _ in range(quota[t]):
            worth = {
                n: weight * float(relevance[n]) - (1 - weight) * max(float(unit[n] @ unit[m]) for m in picked)
                if picked
                else float(relevance[n])
                for n in range(len(frame))
                if n not in picked
            }
            picked.append(max(worth, key=lambda n: (round(worth[n], 6), -n)))
        kept += [t * len(frame) + n for n in sorted(picked)]
    return kept


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_marginal_relevance_is_its_loops(seed, weight):
    frames, text = noise(3, 8, 5, seed=seed), noise(4, 5, seed=seed + 9)
    assert asked(frames, text, keep=13, weight=weight) == relevance_by_loops(frames, text, [5, 4, 4], weight)
    assert asked(frames, text, ratio=0) == list(range(24))
    assert len(asked(frames, text, keep=1)) == 1


def test_marginal_relevance_of_ties_and_padding():
    x, mask = torch.ones(2, 5, 3), torch.tensor([[True] * 3 + [False] * 2, [False, True, True, True, True]])
    x[~mask] = float("nan")
    score = torch.zeros(2, 5).masked_fill(~mask, float("nan"))
    kept = ops.marginal_relevance(x, mask, score, torch.tensor([2, 9]), 5, 0.5)
    assert kept.tolist() == [[True, True, False, False, False], [False, True, True, True, True]]


def test_frames_keep_the_same_number_as_far_as_they_have_it():
    label = torch.tensor([[0] * 6 + [1] * 2 + [2] * 4, [0] * 3 + [2] * 9])
    tokens = visual_tokens([noise(12, 2)] * 2, [9, 10])
    shares = Level().allot(tokens, Groups(label, 3), None)
    assert shares.tolist() == [[4, 2, 3], [3, 0, 7]]


# METok


def shown(*degrees: float, size: int = 1) -> torch.Tensor:
    """Return frames (T, size, 2) at these angles."""
    return circle(*degrees)[:, None].expand(-1, size, -1)


def event_of(x: torch.Tensor, shape: tuple[int, int, int], **params: Any) -> list[int]:
    """Return the event of each frame of one video; x: (T, N, d)."""
    tokens = visual_tokens([x.flatten(0, 1)], [1], tiles=[(Tile(*shape),)])
    groups = Events(by="features", **params).segment(tokens)
    return groups.label.view(shape[0], -1)[:, 0].tolist()


def test_events_by_hand():
    """Likeness .9 .3 .95 .4 .9: of three events the cuts are at .3 and .4, and below .92 there are three cuts more."""
    x = turned_by(0.9, 0.3, 0.95, 0.4, 0.9)[:, None].expand(-1, 2, -1)
    assert event_of(x, (6, 1, 2), frames=2) == [0, 0, 1, 1, 2, 2]
    assert event_of(x, (6, 1, 2), frames=2, most=2) == [0, 0, 1, 1, 1, 1]
    assert event_of(x, (6, 1, 2), below=0.92) == [0, 1, 2, 2, 3, 4]
    assert event_of(x, (6, 1, 2)) == [0] * 6
    assert event_of(shown(0, 0, 90), (3, 1, 1), below=1.0) == [0, 0, 1], "strictly below"
    assert event_of(shown(*[0] * 6), (6, 1, 1), frames=2) == [0, 1, 2, 2, 2, 2], "the first of equal ones"


def runs_by_loops(x: torch.Tensor, there: list[bool], cuts: int, below: float | None) -> list[int]:
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    alike: dict[int, float] = {}
    for t in range(1, len(x)):
        earlier = [n for n in range(t) if there[n]]
        if there[t] and earlier:
            alike[t] = float(unit[t] @ unit[earlier[-1]])
    at = (
        {t for t in alike if alike[t] < below}
        if below is not None
        else set(sorted(alike, key=alike.__getitem__)[:cuts])
    )
    return [sum(t <= n for t in at) for n in range(len(x))]


@pytest.mark.parametrize("below", [None, -0.2, 0.3])
def test_events_are_their_loops(below):
    x = noise(4, 9, 3)
    there = noise(4, 9, seed=1) > -0.7
    x[~there] = float("nan")
    cuts = torch.tensor([0, 2, 4, 20])
    runs = ops.event_runs(x, there, cuts, below)
    for row in range(4):
        expected = runs_by_loops(x[row].nan_to_num(), there[row].tolist(), int(cuts[row]), below)
        kept = there[row].tolist()
        assert [n for n, is_there in zip(runs[row].tolist(), kept, strict=True) if is_there] == [
            n for n, is_there in zip(expected, kept, strict=True) if is_there
        ]


def metok(x: torch.Tensor, states: torch.Tensor, text: torch.Tensor, shape: Any, **params: Any) -> Any:
    """Run the first step on tokens x (N, D)."""
    signals = {
        EncoderStates(): states,
        Embedding("visual", "clip", True): x,
        Embedding("text", "clip", True): text,
    }
    return squeeze.choose(
        "metok", at="projector", features=x, signals=signals, grid=shape, modality="video", frames=2, **params
    )


def test_other_events_are_pooled_by_hand():
    """Relevance .1 .2 .9 .5 .3 .3: two of three events are key events; the frames of the first have a token each."""
    states = turned_by(0.9, 0.3, 0.95, 0.4, 0.9).repeat_interleave(4, 0)
    relevance = torch.tensor([0.1, 0.2, 0.9, 0.5, 0.3, 0.3]).repeat_interleave(4)
    x = torch.stack([relevance, (1 - relevance**2).sqrt(), torch.zeros(24)], 1)
    choice = metok(x, states, torch.tensor([[1.0, 0, 0]]), (6, 2, 2))
    assert choice.kept.tolist() == [0, 4, *range(8, 24)]
    assert torch.equal(choice.features, torch.cat([x[:4].mean(0)[None], x[4:8].mean(0)[None], x[8:]]))
    assert metok(x, states, torch.tensor([[1.0, 0, 0]]), (6, 2, 2), share=1.0).kept.tolist() == list(range(24))
    assert len(metok(x, states, torch.tensor([[1.0, 0, 0]]), (6, 2, 2), share=0.0).kept) == 6


def pooled_by_loops(x, states, text, shape, events, share) -> tuple[list[int], list[torch.Tensor]]:
    frames, height, width = shape
    cells = height * width
    label = runs_by_loops(states.view(frames, cells, -1).mean(1), [True] * frames, events - 1, None)
    cosine = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(text, dim=1).T
    rho = cosine.mean(1).view(frames, cells).mean(1).tolist()
    best = [max(rho[t] for t in range(frames) if label[t] == e) for e in range(max(label) + 1)]
    number = -int(-len(best) * share // 1)
    keys = sorted(range(len(best)), key=lambda e: -best[e])[:number]
    kept, out = [], []
    for t in range(frames):
        if label[t] in keys:
            kept += range(t * cells, (t + 1) * cells)
            out += x[t * cells : (t + 1) * cells].unbind()
            continue
        for h, w in itertools.product(range(0, height, 2), range(0, width, 2)):
            square = [
                (t * height + row) * width + column
                for row in range(h, min(h + 2, height))
                for column in range(w, min(w + 2, width))
            ]
            kept.append(square[0])
            out.append(x[square].mean(0))
    order = sorted(range(len(kept)), key=kept.__getitem__)
    return [kept[n] for n in order], [out[n] for n in order]


@pytest.mark.parametrize("shape", [(5, 3, 3), (7, 2, 4), (4, 1, 1), (1, 4, 4)])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_other_events_are_pooled_by_loops(shape, share):
    number = shape[0] * shape[1] * shape[2]
    x, states, text = noise(number, 4), noise(number, 3, seed=1), noise(3, 4, seed=2)
    choice = metok(x, states, text, shape, share=share)
    kept, means = pooled_by_loops(x, states, text, shape, -(-shape[0] // 2), share)
    assert choice.kept.tolist() == kept
    assert torch.allclose(choice.features, torch.stack(means), atol=1e-6)


@pytest.mark.parametrize("keep", [1, 9, 30, 45])
def test_the_first_step_takes_a_number(keep):
    x, states, text = noise(45, 4), noise(45, 3, seed=1), noise(3, 4, seed=2)
    assert len(metok(x, states, text, (5, 3, 3), first=1 - keep / 45, ratio=1 - keep / 45).kept) == keep


def test_one_for_each_event_by_hand():
    """Weights .2 .5 .3 of six are 1, 3 and 2; who has none gets one from the largest, the best of them first."""
    weight, size = torch.tensor([[0.2, 0.5, 0.3]]), torch.full((1, 3), 9)
    shares = ops.dealt_out(torch.tensor([6]), weight, size)
    assert ops.one_each(shares, size, weight).tolist() == [[1, 3, 2]]
    zeros = torch.tensor([[0, 5, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    weight, size = torch.tensor([[0.1, 0.6, 0.2, 0.1]]).expand(4, -1), torch.tensor([[4, 9, 4, 0]]).expand(4, -1)
    assert ops.one_each(zeros, size, weight).tolist() == [[1, 3, 1, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def in_layers(method: str, row, states, x, text, shape, **params: Any) -> Any:
    """Run the first of the cuts in the language model on one video."""
    step = {step for step in map(str, (s.at for s in load_recipe(method).steps)) if step.startswith("layer")}.pop()
    signals = {
        Attention(): row,
        EncoderStates(): states,
        Embedding("visual", "clip", True): x,
        Embedding("text", "clip", True): text,
    }
    return squeeze.choose(method, at=step, signals=signals, grid=shape, modality="video", **params)


def shares_by_loops(total: int, weight: list[float], size: list[int]) -> list[int]:
    """Largest remainder, at most the size; what is over goes round, the heaviest first."""
    exact = [total * w / sum(weight) for w in weight]
    counts = [int(e + 1e-9) for e in exact]
    for n in sorted(range(len(weight)), key=lambda n: (-round(exact[n] - counts[n], 6), n))[: total - sum(counts)]:
        counts[n] += 1
    counts = [min(c, s) for c, s in zip(counts, size, strict=True)]
    while sum(counts) < min(total, sum(size)):
        for n in sorted(range(len(weight)), key=lambda n: (-weight[n], n)):
            if counts[n] < size[n] and sum(counts) < total:
                counts[n] += 1
    return counts


@pytest.mark.parametrize("keep", [1, 2, 11, 30, 47, 48])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_events_share_a_budget_by_loops(keep, scale):
    """The first of two cuts leaves the root of what is asked for."""
    shape, x, text = (8, 2, 3), noise(48, 4), noise(3, 4, seed=2)
    states, row = noise(48, 3, seed=1), scale * torch.rand(48, generator=torch.Generator().manual_seed(3))
    choice = in_layers("metok", row, states, x, text, shape, frames=2, keep=keep)
    label = runs_by_loops(states.view(8, 6, 3).mean(1), [True] * 8, 3, None)
    rho = (torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(text, dim=1).T).mean(1)
    rho = rho.view(8, 6).mean(1).tolist()
    members = [[n for n in range(48) if label[n // 6] == e] for e in range(4)]
    mean = [float(row[m].mean()) + max(rho[n // 6] for n in m) for m in members]
    weight = torch.tensor(mean).softmax(0).tolist()
    total = len(choice.kept)
    counts = shares_by_loops(total, weight, [len(m) for m in members])
    while 0 in counts and max(counts) > 1:
        counts[counts.index(max(counts))] -= 1
        counts[max((n for n in range(4) if not counts[n]), key=lambda n: weight[n])] += 1
    kept = [n for m, c in zip(members, counts, strict=True) for n in sorted(m, key=lambda n: -float(row[n]))[:c]]
    assert choice.kept.tolist() == sorted(kept)
    assert total >= keep


def test_key_events_of_a_padded_batch_are_those_of_singles():
    tiles = [(Tile(6, 2, 2),), (Tile(3, 3, 3, row_separators=1, tail=1),), (Tile(1, 1, 5),)]
    x = [noise(sum(tile.length for tile in one), 4, seed=n) for n, one in enumerate(tiles)]
    part = KeyEvents(relevance={"norm": {}}, by="features", frames=2)

    def out(rows: list[int], width: int | None = None) -> Groups:
        tokens = visual_tokens([x[n] for n in rows], [1] * len(rows), tiles=[tiles[n] for n in rows], width=width)
        return part.segment(tokens)

    both = out([0, 1, 2], 40)
    for n, one in enumerate(x):
        single = out([n])
        assert both.label[n, : len(one)].tolist() == single.label[0].tolist()
        assert both.part[n, : len(one)].tolist() == single.part[0].tolist()
        assert bool((both.part[n, len(one) :] == -1).all())


# AdaTP


def spread(scores: torch.Tensor, shape: tuple[int, int, int], keep: int) -> list[int]:
    tokens = visual_tokens([scores[:, None]], [keep], tiles=[(Tile(*shape),)])
    return (
        OtherPlaces()
        .select(tokens, whole(tokens), scores[None], tokens.budget[:, None])
        .keep[0]
        .nonzero()
        .T.tolist()[0]
    )


def test_other_places_by_hand():
    """The best three stand at two places; one of each place are 0, 2 and 4."""
    scores = torch.tensor([0.9, 0.2, 0.1, 0.8, 0.3, 0.05])
    assert spread(scores, (2, 1, 3), 3) == [0, 2, 4]
    assert spread(scores, (2, 1, 3), 2) == [0, 4]
    assert spread(scores, (2, 1, 3), 4) == [0, 2, 3, 4]
    assert spread(torch.ones(6), (2, 1, 3), 4) == [0, 1, 2, 3], "the first of equal ones"


def test_places_are_taken_group_by_group_and_separators_have_none():
    tiles = [(Tile(2, 1, 3, row_separators=1),), (Tile(1, 2, 2),)]
    scores = [torch.tensor([5.0, 4, 3, 9, 5, 4, 3, 8]), torch.tensor([1.0, 4, 3, 2])]
    tokens = visual_tokens([one[:, None] for one in scores], [4, 3], tiles=tiles, width=9)
    score = torch.nn.utils.rnn.pad_sequence([*scores, torch.full((9,), torch.nan)], batch_first=True)[:2]
    label = torch.tensor([[0] * 8 + [-1], [0, 0, 1, 1] + [-1] * 5])
    limit = torch.tensor([[4, 0], [1, 2]])
    kept = OtherPlaces().select(tokens, Groups(label, 2), score, limit).keep
    # Two row ends and one of each place would be five.
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 3, 7]
    assert kept[1].nonzero().flatten().tolist() == [1, 2, 3]


def favoured(lengths: list[int], rho: list[float], keep: int, **params: Any) -> list[int]:
    """Return what segments of so many frames of two tokens get; rho: the relevance of each frame."""
    label = torch.tensor([[n for n, length in enumerate(lengths) for _ in range(2 * length)]])
    tokens = visual_tokens(
        [torch.tensor(rho).repeat_interleave(2)[:, None]], [keep], tiles=[(Tile(sum(lengths), 1, 2),)]
    )
    part = Favoured(relevance={"norm": {}}, **params)
    return part.allot(tokens, Groups(label, len(lengths)), None)[0].tolist()


def test_favoured_segments_by_hand():
    """Of 4 and 2 frames the second counts twice: 6 and 6 of 12, but it has four; by length they would be 8 and 4."""
    assert favoured([4, 2], [1.0, 1, 1, 1, 1, 2], 6) == [3, 3]
    assert favoured([4, 2], [1.0, 1, 1, 1, 1, 2], 6, times=1.0) == [4, 2]
    assert favoured([4, 2], [1.0, 1, 1, 1, 1, 2], 10) == [6, 4]
    assert favoured([4, 2], [1.0, 1, 1, 1, 1, 2], 6, share=1.0) == [4, 2]
    assert favoured([4, 2], [1.0, 1, 1, 3, 1, 2], 5) == [4, 1]
    assert favoured([3], [1.0, 1, 1], 6) == [6]


def test_a_segment_counts_by_its_frames_whatever_is_left_of_them():
    """Two frames of four tokens and two of one: five tokens are shared by half, and the second has but two."""
    label = torch.tensor([[0] * 8 + [1, -1, -1, -1, 1, -1, -1, -1]])
    tokens = visual_tokens([torch.ones(16, 1)], [5], tiles=[(Tile(4, 1, 4),)])
    allotted = Favoured(relevance={"norm": {}}, times=1.0).allot(tokens, Groups(label, 2), None)
    assert allotted.tolist() == [[3, 2]]


def adatp_by_loops(row, states, x, text, shape, total, alike, share, times) -> list[int]:
    frames, cells = shape[0], shape[1] * shape[2]
    label = runs_by_loops(states.view(frames, cells, -1).mean(1), [True] * frames, 0, alike)
    number = max(label) + 1
    rho = (torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(text, dim=1).T).mean(1)
    rho = rho.view(frames, cells).mean(1).tolist()
    best = [max(rho[t] for t in range(frames) if label[t] == e) for e in range(number)]
    relevant = sorted(range(number), key=lambda e: -best[e])[: -int(-number * share // 1)]
    weight = [float(label.count(e)) * (times if e in relevant else 1) for e in range(number)]
    counts = shares_by_loops(total, weight, [label.count(e) * cells for e in range(number)])
    kept: list[int] = []
    for e in range(number):
        turn: dict[int, int] = {}
        for n in range(cells):
            at = sorted((t * cells + n for t in range(frames) if label[t] == e), key=lambda i: -float(row[i]))
            turn |= {i: place for place, i in enumerate(at)}
        kept += sorted(turn, key=lambda i: (turn[i], -float(row[i])))[: counts[e]]
    return sorted(kept)


@pytest.mark.parametrize("keep", [1, 2, 7, 19, 35, 53, 54])
@pytest.mark.parametrize("alike", [-1.0, 0.2, 1.0])
def test_adatp_is_its_loops(keep, alike):
    shape, x, text = (9, 2, 3), noise(54, 4), noise(3, 4, seed=2)
    states, row = noise(54, 3, seed=1), torch.rand(54, generator=torch.Generator().manual_seed(3))
    choice = in_layers("adatp", row, states, x, text, shape, alike=alike, kept=[keep / 54] * 3)
    assert len(choice.kept) == keep
    assert choice.kept.tolist() == adatp_by_loops(row, states, x, text, shape, keep, alike, 0.5, 2.0)


def test_adatp_asks_for_a_grid():
    with pytest.raises(UnsupportedInputError, match="grid of this input is not known"):
        in_layers("adatp", torch.rand(6), noise(6, 3), noise(6, 4), noise(2, 4), None, ratio=0.5)
