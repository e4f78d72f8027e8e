"""Selections and merges against their literal references, in groups and in batches; halves of a video."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from reference import parts as literal
from reference.build import visual_tokens
from reference.rules import best, density_peaks, mean

from mllm_squeeze import ops
from mllm_squeeze.layout import Tile
from mllm_squeeze.parts.base import Groups, Picks
from mllm_squeeze.reducers.needs import EncoderProjection, Normed, Projection, Size
from mllm_squeeze.reducers.pipeline import Pipeline
from mllm_squeeze.registry import build_part, part_class, part_names

LENGTHS = [7, 12, 1, 9]
WIDTH = 15
SELECTS = [
    "top_k",
    {"stride": "even"},
    {"stride": "whole"},
    "farthest_point",
    {"dpp": "score"},
    {"dpp": "none"},
    "facility_location",
    {"density_peaks": 3},
    {"in_turn": [{"select": "top_k", "share": 0.6}, {"select": "stride"}]},
    {"in_turn": [{"select": {"stride": "even"}, "share": 0.25}, {"select": "top_k", "score": {"norm": {"sign": -1}}}]},
]


def made(seed=0, rows=range(4), width=WIDTH):
    torch.manual_seed(seed)
    features = [torch.randn(n, 6) for n in LENGTHS]
    keys = [torch.randn(n, 4) for n in LENGTHS]
    sizes = [torch.randint(1, 5, (n,)).float() for n in LENGTHS]
    score = [torch.rand(n) for n in LENGTHS]
    label = [torch.randint(0, 3, (n,)) for n in LENGTHS]
    tokens = visual_tokens(
        [features[r] for r in rows],
        [LENGTHS[r] for r in rows],
        signals={
            EncoderProjection(): [keys[r] for r in rows],
            Size(): [sizes[r] for r in rows],
        },
        width=width,
    )

    def padded(values, fill):
        out = torch.full((len(rows), width), fill, dtype=values[0].dtype)
        for i, r in enumerate(rows):
            out[i, : LENGTHS[r]] = values[r]
        return out

    return tokens, Groups(padded(label, -1), 3), padded(score, float("nan"))


def whole(groups):
    return Groups(groups.label.clamp(max=0), 1)


def limits(groups, share):
    return (ops.segment_count(groups.label, groups.count) * share).ceil().long()


def picked(part, tokens, groups, score, limit):
    keep = build_part("select", part).select(tokens, groups, score, limit).keep
    return [row.nonzero()[:, 0].tolist() for row in keep]


def members(groups, row, group):
    return (groups.label[row] == group).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("part", SELECTS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_each_group_keeps_its_limit(part, share):
    tokens, groups, score = made(1)
    for own in (groups, whole(groups)):
        limit = limits(own, share)
        for row, kept in enumerate(picked(part, tokens, own, score, limit)):
            for group in range(own.count):
                assert len(set(kept) & set(members(own, row, group))) == limit[row, group]


@pytest.mark.parametrize("part", SELECTS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_row_of_a_batch_and_a_group_are_what_they_are_alone(part, seed):
    tokens, groups, score = made(seed)
    limit = limits(groups, 0.5)
    together = picked(part, tokens, groups, score, limit)
    for row, kept in enumerate(together):
        alone, own, own_score = made(seed, rows=[row], width=LENGTHS[row])
        assert picked(part, alone, own, own_score, limit[row : row + 1]) == [kept]
        for group in range(3):
            one = Groups(torch.where(groups.label == group, 0, -1), 1)
            expected = picked(part, tokens, one, score, limit[:, group : group + 1])[row]
            assert expected == [i for i in kept if groups.label[row, i] == group]


def test_stride_takes_the_tokens_that_it_says():
    tokens, groups, score = made()
    groups = whole(groups)
    score = score.masked_fill(torch.arange(WIDTH) % 4 == 1, -math.inf)
    for step in ("even", "whole"):
        for k in range(1, 9):
            limit = torch.full((4, 1), k)
            for row, kept in enumerate(picked({"stride": step}, tokens, groups, score, limit)):
                pieces = [i for i in range(LENGTHS[row]) if i % 4 != 1]
                others = [i for i in range(LENGTHS[row]) if i % 4 == 1]
                first = literal.strided(pieces, k, step)
                assert kept == sorted(first + others[: k - len(first)])


def test_greedy_selections_are_the_literal_searches():
    tokens, groups, score = made(2)
    limit = limits(groups, 0.6)
    for part, rule in (("farthest_point", literal.farthest), ("facility_location", literal.cover)):
        for row, kept in enumerate(picked(part, tokens, groups, score, limit)):
            expected = []
            for group in range(3):
                own = members(groups, row, group)
                x = tokens.features[row][own].tolist()
                expected += [own[i] for i in rule(x, int(limit[row, group]))] if own else []
            assert kept == sorted(expected)


def test_density_peaks_are_the_centres_of_the_clusters():
    tokens, groups, score = made(3)
    limit = limits(groups, 0.5)
    for row, kept in enumerate(picked("density_peaks", tokens, groups, score, limit)):
        expected = []
        for group in range(3):
            own = members(groups, row, group)
            x = tokens.features[row][own].tolist()
            expected += [own[i] for i in set(density_peaks(x, int(limit[row, group])))] if own else []
        assert kept == sorted(expected)


def test_neighbours_of_a_density_are_as_many_as_asked():
    x = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(1, 9, dtype=torch.bool)
    own = ops.density_peaks(x, mask, torch.tensor([3]))
    assert torch.equal(own, ops.density_peaks(x, mask, torch.tensor([3]), 3))
    others = [ops.density_peaks(x, mask, torch.tensor([3]), n) for n in (1, 2, 5, 9)]
    assert any(not torch.equal(own, other) for other in others)


@pytest.mark.parametrize("of", ["score", "mean", "max"])
def test_a_threshold_decides(of):
    tokens, groups, score = made(5)
    part = build_part("select", {"threshold": {"above": 0.7, "of": of}})
    assert part.decides
    for row, kept in enumerate(picked(part, tokens, whole(groups), score, limits(whole(groups), 1.0))):
        own = score[row, : LENGTHS[row]].tolist()
        bar = {"score": 0.7, "mean": 0.7 * math.fsum(own) / len(own), "max": 0.7 * max(own)}[of]
        assert kept == ([i for i, s in enumerate(own) if s > bar] or best(own, range(len(own)), 1))


def test_turns_are_told_apart():
    tokens, groups, score = made(6)
    part = build_part("select", {"in_turn": [{"select": "top_k"}, {"select": "stride", "share": 0.25}]})
    limit = torch.tensor([[4], [8], [1], [6]])
    picks = part.select(tokens, whole(groups), score, limit)
    for row, (first, second) in enumerate([(3, 1), (6, 2), (1, 0), (4, 2)]):
        own = score[row, : LENGTHS[row]].tolist()
        top = sorted(best(own, range(len(own)), first))
        assert (picks.turn[row] == 0).nonzero()[:, 0].tolist() == top
        left = [i for i in range(len(own)) if i not in top]
        assert (picks.turn[row] == 1).nonzero()[:, 0].tolist() == literal.strided(left, second, "even")
    assert torch.equal(picks.last(), picks.turn == 1)
    assert picks.most[1] >= 2
    assert part.select(tokens, whole(groups), score, limit).most == (9, 3)


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([{"select": "top_k"}, {"select": "stride"}], "each turn but one has a share"),
        ([{"select": "top_k", "share": 0.7}, {"select": "stride", "share": 0.7}, {"select": "top_k"}], "at most 1"),
        ([{"select": {"threshold": 0.5}}], "got Threshold"),
        ([{"select": "even_sample"}], "got EvenSample"),
    ],
)
def test_turns_that_do_not_add_up(turns, says):
    with pytest.raises(ValueError, match=says):
        Pipeline(select={"in_turn": turns}, score="norm")


# Merges


def reduced(merge, tokens, groups, turn, score=None):
    picks = Picks(turn, (9, 9) if (turn == 1).any() else (9,))
    return build_part("merge", merge).merge(tokens, groups, picks, score)


def turns(groups, seed=0):
    torch.manual_seed(seed)
    turn = torch.randint(-1, 2, groups.label.shape)
    turn[:, 0] = 1
    return turn.masked_fill(groups.label < 0, -1)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("into", ["all", "last"])
@pytest.mark.parametrize("weights", ["mean", "size", "added_mean"])
def test_each_token_goes_into_the_nearest_survivor(grouped, into, weights):
    tokens, groups, score = made(7)
    groups = groups if grouped else whole(groups)
    turn = turns(groups)
    score = score.masked_fill(torch.arange(WIDTH) == 4, -math.inf)
    merge = {"nearest": {"by": "encoder_keys", "into": into, "weights": weights}}
    out = reduced(merge, tokens, groups, turn, score)
    assert torch.equal(out.keep, turn >= 0)
    states = out.states(tokens.features)
    for row, n in enumerate(LENGTHS):
        x = tokens[EncoderProjection()][row, :n].tolist()
        size = tokens[Size()][row, :n].tolist()
        expected = {i: i for i in range(n) if turn[row, i] >= 0}
        for group in range(groups.count):
            own = [i for i in members(groups, row, group) if i != 4]
            targets = [i for i in own if turn[row, i] >= 0 and (into == "all" or turn[row, i] == 1)]
            expected |= literal.nearest(x, [i for i in own if turn[row, i] < 0], targets)
        assert {i: int(a) for i, a in enumerate(out.assign[row]) if a >= 0} == expected
        for t in range(n):
            if turn[row, t] < 0:
                continue
            joined = [i for i, a in expected.items() if a == t and i != t]
            own_state = tokens.features[row, t]
            rest = tokens.features[row][joined]
            if weights == "added_mean":
                value = own_state + (rest.mean(0) if joined else 0)
            else:
                w = torch.tensor([size[i] if weights == "size" else 1.0 for i in (t, *joined)])
                value = (w[:, None] * torch.cat([own_state[None], rest])).sum(0) / w.sum()
            torch.testing.assert_close(states[row, t], value)


def test_clusters_are_means_of_what_is_nearest():
    tokens, groups, _ = made(8)
    turn = turns(groups).clamp(max=0)
    out = reduced("cluster", tokens, groups, turn)
    for row, n in enumerate(LENGTHS):
        for i in range(n):
            own = [j for j in members(groups, row, int(groups.label[row, i])) if turn[row, j] >= 0]
            x = tokens.features[row].tolist()
            near = i if turn[row, i] >= 0 else min(own, key=lambda j: math.dist(x[i], x[j])) if own else -1
            assert out.assign[row, i] == near


def test_centres_and_clusters_are_density_peak_clustering():
    tokens, groups, _ = made(9)
    limit = torch.tensor([[3], [4], [1], [2]])
    picks = build_part("select", "density_peaks").select(tokens, whole(groups), None, limit)
    out = build_part("merge", "cluster").merge(tokens, whole(groups), picks, None)
    assert torch.equal(out.assign, ops.density_peaks(tokens.features, tokens.mask, limit[:, 0]))


@pytest.mark.parametrize("weights", ["mean", "score"])
@pytest.mark.parametrize("budget", [1, 3, 12])
def test_all_others_become_one_token(weights, budget):
    tokens, _, _ = made(10)
    tokens = dataclasses.replace(tokens, budget=torch.full((4,), budget).minimum(tokens.mask.sum(1)))
    pipeline = Pipeline(score={"norm": "features"}, merge={"fused_token": weights})
    out = pipeline.reduce(tokens)
    states = out.states(tokens.features)
    for row, n in enumerate(LENGTHS):
        x = tokens.features[row, :n].tolist()
        length = [math.hypot(*v) for v in x]
        order = best(length, range(n), n)
        k = min(budget, n)
        assert sorted(order[:k]) == out.keep[row].nonzero()[:, 0].tolist()
        fused = order[k - 1 :]
        w = [length[i] if weights == "score" else 1.0 for i in fused]
        expected = mean([[v * a * len(fused) / math.fsum(w) for v in x[i]] for i, a in zip(fused, w, strict=True)])
        torch.testing.assert_close(states[row, fused[0]], torch.tensor(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[row, order[: k - 1]], tokens.features[row, order[: k - 1]])


# Halves of a video

TILES = [(Tile(6, 2, 3),), (Tile(4, 2, 3),), (Tile(1, 2, 3),)]
HALVES = {
    "segment": {"stillness": {"threshold": 0.0, "frames": 2}},
    "parts": {
        "static": {"select": "density_peaks", "merge": "cluster"},
        "dynamic": {"segment": "frame", "score": {"norm": {"sign": -1}}, "select": "top_k"},
    },
}


def video(seed=0, share=0.5):
    torch.manual_seed(seed)
    lengths = [t.cells for (t,) in TILES]
    return visual_tokens([torch.randn(n, 6) for n in lengths], [int(n * share) for n in lengths], tiles=TILES)


@pytest.mark.parametrize("seed", range(3))
def test_each_half_of_a_video_goes_its_own_way(seed):
    tokens, pipeline = video(seed), Pipeline(**HALVES)
    out = pipeline.reduce(tokens)
    groups = pipeline.segment.segment(tokens)
    limit = build_part("budget", "even").allot(tokens, groups, None)
    assert out.keep.sum(1).tolist() == list(tokens.counts)
    assert pipeline.facts.merges
    assert not pipeline.facts.known_count
    for row, (tile,) in enumerate(TILES):
        x = tokens.features[row].tolist()
        expected = set()
        for window in range((tile.frames + 1) // 2):
            own = (groups.label[row] == 2 * window).nonzero()[:, 0].tolist()
            if own:
                centres = density_peaks([x[i] for i in own], int(limit[row, 2 * window]))
                expected |= {own[c] for c in centres}
                assert [own[c] for c in centres] == out.assign[row][own].tolist() or not limit[row, 2 * window]
        moving = [i for i in range(tile.cells) if groups.part[row, i] == 1]
        frames = [[i for i in moving if i // 6 == t] for t in range(6)]
        sizes = [len(f) for f in frames]
        total = int(limit[row][1::2].sum())
        for own, k in zip(frames, literal.shared(total, sizes) if moving else [0] * 6, strict=True):
            expected |= set(best([-math.hypot(*v) for v in x], own, k))
        assert sorted(expected) == out.keep[row].nonzero()[:, 0].tolist()
        for i in moving:
            assert out.assign[row, i] == (i if out.keep[row, i] else -1)


def test_a_batch_of_halves_is_what_each_is_alone():
    pipeline, together = Pipeline(**HALVES), video(4)
    out = pipeline.reduce(together)
    for row, (tile,) in enumerate(TILES):
        n = tile.cells
        alone = visual_tokens([together.features[row, :n]], [together.counts[row]], tiles=[TILES[row]])
        one = pipeline.reduce(alone)
        assert torch.equal(one.keep[0], out.keep[row, :n])
        assert torch.equal(one.assign[0], out.assign[row, :n])


# Registry


def test_every_part_says_what_it_does_and_what_its_parameters_are():
    for kind in ("score", "segment", "budget", "select", "merge"):
        for name in part_names(kind):
            cls = part_class(kind, name)
            assert cls.__doc__.splitlines()[0].endswith((".", ","))
            for field in cls.model_fields:
                assert field in cls.__doc__, f"{kind}.{name} does not say what {field} is"


def test_pivots_need_a_score():
    with pytest.raises(ValueError, match="select 'pivots' picks by a score"):
        Pipeline(select="pivots")
    assert set(Pipeline(select="pivots", score={"norm": "keys"}).needs()) == {
        Projection(),
        Projection(of="text"),
        Normed(),
        Normed("text"),
    }
