"""Scores, segments and budgets against their literal references; batches, padding and ties."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from reference import parts as literal
from reference.build import visual_tokens
from reference.rules import best

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.layout import Tile
from mllm_squeeze.parts.base import Groups
from mllm_squeeze.reducers.needs import Embedding, Features, Projection, Size
from mllm_squeeze.registry import build_part

LENGTHS = [7, 12, 1, 9]
WHOLE = build_part("segment", "whole")


def made(seed=0, signals=(), words=None, lengths=LENGTHS, tiles=None, budgets=None):
    """Tokens of some lengths with random features and signals, NaN at padding."""
    torch.manual_seed(seed)
    features = [torch.randn(n, 6) for n in lengths]
    text = None if words is None else {need: [torch.randn(n, 6) for n in words] for need in (Features("text"),)}
    return visual_tokens(
        features,
        budgets or [max(1, n // 2) for n in lengths],
        signals={need: [torch.randn(n, 6) for n in lengths] for need in signals},
        text=text,
        tiles=tiles,
        width=15 if tiles is None else None,
    )


def lists(tokens, row, x):
    return x[row][tokens.mask[row]].tolist()


def close(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


# Scores


@pytest.mark.parametrize("how", ["none", "minmax", "zscore", "softmax", "rank"])
def test_scores_are_brought_to_a_scale_of_each_span(how):
    tokens = made()
    score = tokens.features[..., 0].round(decimals=1)
    out = ops.normalised(score, tokens.mask, how)
    for row in range(4):
        close(lists(tokens, row, out), literal.normalised(lists(tokens, row, score), how))
    same = ops.normalised(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), how)[0].tolist()
    close(same, literal.normalised([1.0] * 3, how))


@pytest.mark.parametrize("how", ["none", "minmax", "zscore", "softmax", "rank"])
def test_what_is_no_piece_of_the_picture_stays_so(how):
    score = torch.tensor([[2.0, -math.inf, 1.0, 7.0]])
    mask = torch.tensor([[True, True, True, False]])
    out = ops.normalised(score, mask, how)
    assert out[0, 1] == -math.inf
    close(out[0, [0, 2]].tolist(), literal.normalised([2.0, 1.0], how))


def test_an_unknown_scale_is_an_error():
    with pytest.raises(ValueError, match="got 'max'"):
        ops.normalised(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), "max")


@pytest.mark.parametrize("how", ["sum", "product", "rank"])
def test_fused_scores(how):
    tokens = made(signals=[Projection()])
    terms = [
        {"score": {"norm": "features"}, "weight": 0.5, "normalise": "minmax"},
        {"score": {"norm": {"of": "keys", "order": 1}}, "weight": 2.0, "sign": -1, "normalise": "zscore"},
    ]
    fused = build_part("score", {"fused": {"of": terms, "how": how}})
    assert fused.every() is not None
    assert {need for part in fused.every() for need in part.needs()} == {Features(), Projection()}
    out = fused.score(tokens, WHOLE.segment(tokens))
    for row in range(4):
        one = [math.hypot(*x) for x in lists(tokens, row, tokens.features)]
        two = [-math.fsum(map(abs, x)) for x in lists(tokens, row, tokens[Projection()])]
        scales = ["rank", "rank"] if how == "rank" else ["minmax", "zscore"]
        a, b = (literal.normalised(s, scale) for s, scale in zip((one, two), scales, strict=True))
        if how == "product":
            expected = [max(x, 0) ** 0.5 * max(y, 0) ** 2 for x, y in zip(a, b, strict=True)]
        else:
            expected = [0.5 * x + 2 * y for x, y in zip(a, b, strict=True)]
        close(lists(tokens, row, out), expected)


def test_a_fused_score_never_brings_a_separator_back():
    class Marked(type(build_part("score", "norm"))):
        def score(self, tokens, groups):
            return super().score(tokens, groups).masked_fill(torch.arange(15) == 3, -math.inf)

    fused = build_part("score", {"fused": [{"score": Marked(), "sign": -1}, {"score": "norm", "normalise": "rank"}]})
    tokens = made()
    out = fused.score(tokens, WHOLE.segment(tokens))
    assert (out[[0, 1, 3], 3] == -math.inf).all()
    assert out[0, :3].isfinite().all()


@pytest.mark.parametrize("over", ["max", "mean"])
def test_similarity_to_the_words(over):
    tokens = made(words=[3, 5, 1, 2])
    part = build_part("score", {"text_similarity": {"over": over, "sign": -1}})
    out = part.score(tokens, WHOLE.segment(tokens))
    for row, words in enumerate([3, 5, 1, 2]):
        text = tokens[Features("text")][row, :words].tolist()
        expected = literal.text_similarity(lists(tokens, row, tokens.features), text, over)
        close(lists(tokens, row, out), [-x for x in expected])


def test_a_pooled_prompt_is_one_word():
    tokens = made(words=[3, 5, 1, 2], signals=[Embedding("visual", "clip")])
    pooled = torch.randn(4, 1, 6)
    tokens.signals[Embedding("text", "clip")] = pooled
    part = build_part("score", {"text_similarity": "clip"})
    out = part.score(tokens, WHOLE.segment(tokens))
    for row in range(4):
        x = lists(tokens, row, tokens[Embedding("visual", "clip")])
        close(lists(tokens, row, out), literal.text_similarity(x, pooled[row].tolist(), "max"))


def test_isolation_and_size():
    tokens = made(signals=[Size()])
    out = build_part("score", "isolation").score(tokens, WHOLE.segment(tokens))
    for row in range(4):
        close(lists(tokens, row, out), literal.isolation(lists(tokens, row, tokens.features)))
    tokens.signals[Size()] = torch.arange(60.0).view(4, 15)
    assert torch.equal(build_part("score", {"size": -1}).score(tokens, WHOLE.segment(tokens)), -tokens[Size()])


@pytest.mark.parametrize("against", ["span", "group"])
@pytest.mark.parametrize("channels", [0.5, 1.0])
def test_uniqueness(against, channels):
    tokens = made()
    label = (torch.arange(15) % 3).expand(4, 15).masked_fill(~tokens.mask, -1)
    part = build_part("score", {"uniqueness": {"against": against, "channels": channels}})
    out = part.score(tokens, Groups(label, 3))
    for row, n in enumerate(LENGTHS):
        group = [i % 3 for i in range(n)]
        close(
            lists(tokens, row, out), literal.uniqueness(lists(tokens, row, tokens.features), group, against, channels)
        )


def test_what_several_parts_need_is_worked_out_once(monkeypatch):
    calls = []
    plain = ops.quiet_channels
    monkeypatch.setattr(ops, "quiet_channels", lambda *given: calls.append(1) or plain(*given))
    tokens = made()
    groups = WHOLE.segment(tokens)
    for against in ("span", "group", "span"):
        build_part("score", {"uniqueness": against}).score(tokens, groups)
    assert len(calls) == 1


def test_noise_hangs_on_the_seed_and_the_count_only():
    tokens, alone = made(), made(lengths=[12])
    part = build_part("score", {"random": 3})
    together = part.score(tokens, WHOLE.segment(tokens))
    assert torch.equal(together[1, :12], part.score(alone, WHOLE.segment(alone))[0, :12])
    assert not torch.equal(
        together[1, :12], build_part("score", {"random": 4}).score(tokens, WHOLE.segment(tokens))[1, :12]
    )


# Segments

VIDEO = [(Tile(5, 2, 3),), (Tile(1, 2, 2), Tile(2, 1, 2)), (Tile(3, 4, 2),)]


def video(seed=0, **options):
    return made(seed, lengths=[sum(t.cells for t in tiles) for tiles in VIDEO], tiles=VIDEO, **options)


def by_hand(tokens, row, rule):
    cells = [(tile, *c) for tile, shape in enumerate(VIDEO[row]) for c in shape.coordinates()]
    return [rule(row, *cell) for cell in cells]


@pytest.mark.parametrize(
    ("name", "rule", "count"),
    [
        ("tile", lambda row, tile, t, h, w: tile, 2),
        ("frame", lambda row, tile, t, h, w: t + (1 if tile else 0), 5),
        ({"window": 2}, lambda row, tile, t, h, w: (t + (1 if tile else 0)) // 2, 3),
        (
            {"grid_window": 2},
            lambda row, tile, t, h, w: {
                (0, 0): t * 2 + w // 2,
                (1, 0): 0,
                (1, 1): 1 + t,
                (2, 0): t * 2 + h // 2,
            }[row, tile],
            10,
        ),
    ],
    ids=lambda value: "rule" if callable(value) else str(value),
)
def test_groups_follow_the_grid(name, rule, count):
    tokens = video()
    groups = build_part("segment", name).segment(tokens)
    assert groups.count == count
    for row in range(3):
        assert lists(tokens, row, groups.label) == by_hand(tokens, row, rule)
    assert (groups.label[~tokens.mask] == -1).all()


@pytest.mark.parametrize("name", ["whole", "tile", "frame", {"window": 2}, {"grid_window": 2}], ids=str)
def test_without_a_grid_all_is_one_group(name):
    tokens = made()
    groups = build_part("segment", name).segment(tokens)
    assert torch.equal(groups.label, tokens.mask.long() - 1)


@pytest.mark.parametrize("frames", [None, 2, 3])
def test_what_stands_still(frames):
    shapes = [(Tile(5, 2, 3),), (Tile(3, 2, 3),), (Tile(1, 2, 3),)]
    lengths = [t.cells for (t,) in shapes]
    tokens = made(3, lengths=lengths, tiles=shapes)
    part = build_part("segment", {"stillness": {"threshold": 0.0, "frames": frames}})
    groups = part.segment(tokens)
    assert part.parts == ("static", "dynamic")
    kinds = set()
    for row, (tile,) in enumerate(shapes):
        window = frames or 5
        expected = literal.still(lists(tokens, row, tokens.features), tile.frames, 2, 3, window, 0.0)
        assert lists(tokens, row, groups.label) == expected
        assert lists(tokens, row, groups.part) == [g % 2 for g in expected]
        kinds |= {g % 2 for g in expected}
    assert kinds == {0, 1}
    with pytest.raises(UnsupportedInputError, match="segment: frame"):
        part.segment(made())


# Budgets


def labels(seed=0, count=3):
    tokens = made(seed, budgets=[4, 7, 1, 9])
    torch.manual_seed(seed)
    label = torch.randint(0, count, tokens.mask.shape).masked_fill(~tokens.mask, -1)
    return tokens, Groups(label, count)


@pytest.mark.parametrize("seed", range(4))
def test_an_even_budget_is_shared_by_size(seed):
    tokens, groups = labels(seed)
    out = build_part("budget", "even").allot(tokens, groups, None)
    for row in range(4):
        sizes = [(groups.label[row] == g).sum().item() for g in range(3)]
        assert out[row].tolist() == literal.shared(tokens.counts[row], sizes)


@pytest.mark.parametrize("keep", [1, 2, 0.5, 1.0])
def test_a_fixed_budget_is_the_same_of_each_group(keep):
    tokens, groups = labels()
    part = build_part("budget", {"fixed": keep})
    out = part.allot(tokens, groups, None)
    assert part.decides
    for row in range(4):
        sizes = [(groups.label[row] == g).sum().item() for g in range(3)]
        asked = [keep if isinstance(keep, int) else max(1, math.floor(n * keep + 0.5)) for n in sizes]
        assert out[row].tolist() == [min(a, n) for a, n in zip(asked, sizes, strict=True)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_a_mass_budget_is_the_fewest_that_hold_the_share(share):
    tokens, groups = labels(2)
    torch.manual_seed(1)
    score = torch.rand(4, 15).masked_fill(~tokens.mask, float("nan"))
    out = build_part("budget", {"mass": share}).allot(tokens, groups, score)
    for row in range(4):
        for g in range(3):
            own = score[row][groups.label[row] == g].tolist()
            assert out[row, g] == (literal.mass(own, share) if own else 0)


def test_an_untypical_frame_gets_more():
    tokens, groups = labels(1)
    torch.manual_seed(5)
    score = torch.rand(4, 15).masked_fill(~tokens.mask, float("nan"))
    out = build_part("budget", {"softmax": 0.3}).allot(tokens, groups, score)
    for row in range(4):
        own = [score[row][groups.label[row] == g].tolist() for g in range(3)]
        there = [s for s in own if s]
        e = [math.exp(math.fsum(s) / len(s) / 0.3) for s in there]
        total = sum(map(len, there))
        for s, x in zip(there, e, strict=True):
            scale = min(1.0, tokens.counts[row] / total * (1 + x / math.fsum(e) - 1 / len(there)))
            expected = max(1, round(scale * len(s)))
            if tokens.counts[row] >= total:
                expected = len(s)
            assert out[row, own.index(s)] == expected


def test_the_first_of_equals_stays():
    tokens = dataclasses.replace(made(), budget=torch.tensor([3, 3, 1, 3]))
    groups = WHOLE.segment(tokens)
    picks = build_part("select", "top_k").select(tokens, groups, torch.ones(4, 15), tokens.budget[:, None])
    assert [row.nonzero()[:, 0].tolist() for row in picks.keep] == [best([1.0] * n, range(n), 3) for n in LENGTHS]
