"""VidCom2 and DyCoke: worked examples of the specs and literal rules."""

from __future__ import annotations

import pytest
import torch
from reference import rules
from reference.build import chosen, circle, visual_tokens
from reference.methods import frame_uniqueness

from mllm_squeeze import ops
from mllm_squeeze.errors import ConfigError, UnsupportedInputError
from mllm_squeeze.layout import Tile
from mllm_squeeze.recipe.build import build_reducer
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.decode_refresh import DecodeRefresh
from mllm_squeeze.reducers.temporal_windows import TemporalWindows


def flat(per_frame, area):
    return [t * area + i for t, kept in enumerate(per_frame) for i in kept]


def frames_of(x, frames):
    return x.double().reshape(frames, -1, x.shape[-1]).tolist()


def test_vidcom2_scales_worked_example():
    unique, size = torch.tensor([[-4.00, -4.02]]), torch.tensor([[20.0, 20.0]])
    assert ops.untypical_share(unique, size, torch.tensor([10]), 0.01).tolist() == [[7, 3]]


def test_vidcom2_worked_example():
    tokens = visual_tokens([circle(0, 0, 0, 90)], [2], tiles=[(Tile(2, 1, 2),)])
    keep = frame_uniqueness(channels=1.0).reduce(tokens).keep
    assert chosen(keep) == [0, 2, 3]


@pytest.mark.parametrize("channels", [0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_vidcom2_against_the_literal_rule(seed, channels):
    torch.manual_seed(seed)
    shapes, kept = [(4, 2, 3), (1, 3, 3), (7, 1, 5), (3, 2, 2)], [6, 4, 9, 12]
    tiles = [(Tile(*shape),) for shape in shapes]
    features = [torch.randn(t * h * w, 7) + 1.5 * torch.randn(7) for t, h, w in shapes]
    keep = frame_uniqueness(channels=channels, temperature=0.3).reduce(visual_tokens(features, kept, tiles=tiles)).keep
    for i, (t, h, w) in enumerate(shapes):
        if kept[i] == t * h * w:
            expected = [list(range(h * w))] * t
        else:
            expected = rules.vidcom2(frames_of(features[i], t), kept[i] / (t * h * w), channels, 0.3)
        assert chosen(keep, i) == flat(expected, h * w)


def test_vidcom2_counts_an_unknown_grid_as_one_frame():
    x = torch.randn(10, 6)
    unknown = frame_uniqueness().reduce(visual_tokens([x], [4])).keep
    single = frame_uniqueness().reduce(visual_tokens([x], [4], tiles=[(Tile(1, 2, 5),)])).keep
    assert torch.equal(unknown, single)
    assert unknown.sum() == 4


DYCOKE = torch.cat([circle(0, 30, 60, 90), circle(0, 40, 60, 130), circle(80, 30, 62, 95), circle(85, 30, 152, 95)])


def test_dycoke_worked_example():
    tokens = visual_tokens([DYCOKE], [10], tiles=[(Tile(4, 2, 2),)])
    keep = TemporalWindows().reduce(tokens).keep
    assert chosen(keep) == [0, 1, 2, 3, 5, 7, 8, 11, 12, 14]


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("seed", range(3))
def test_dycoke_against_the_literal_rule(seed, variant):
    torch.manual_seed(seed)
    shapes, budgets = [(8, 2, 3), (1, 2, 2), (7, 3, 2), (5, 1, 4), (4, 2, 2), (2, 2, 2)], [25, 4, 20, 9, 16, 7]
    tiles = [(Tile(*shape),) for shape in shapes]
    features = [torch.randn(t * h * w, 4) for t, h, w in shapes]
    reducer = TemporalWindows(variant=variant)
    keep = reducer.reduce(visual_tokens(features, budgets, tiles=tiles)).keep
    for i, (t, h, w) in enumerate(shapes):
        expected = flat(rules.dycoke(frames_of(features[i], t), budgets[i], variant == "official"), h * w)
        assert chosen(keep, i) == expected
        assert len(expected) == reducer.count(t * h * w, budgets[i], tiles[i])


def test_dycoke_keeps_the_papers_numbers():
    tile = (Tile(32, 14, 14),)
    budget = 2979  # 0.475 of 6272
    assert TemporalWindows().count(6272, budget, tile) == 2960  # 8 * 196 + 24 * 58
    assert TemporalWindows(variant="official").count(6272, budget, tile) == 3098
    assert TemporalWindows().count(6272, 6272, tile) == 6272


def test_dycoke_leaves_separators_and_several_tiles_alone():
    rows = torch.randn(2 * 3 * 2 + 2 * 2 + 1, 4)
    newlines = (Tile(2, 3, 2, frame_lead=2, tail=1),)
    tokens = visual_tokens([rows, rows[:12]], [13, 9], tiles=[newlines, (Tile(1, 3, 2), Tile(1, 3, 2))])
    reducer = TemporalWindows()
    keep = reducer.reduce(tokens).keep
    separators = [i for i, c in enumerate(newlines[0].coordinates()) if c[0] < 0]
    assert set(separators) <= set(chosen(keep))
    assert keep.sum(1).tolist() == [13, 9] == [reducer.count(17, 13, newlines), reducer.count(12, 9, tokens.tiles[1])]


def test_dycoke_says_what_it_cannot_do():
    says = r"dycoke.*step 1.*4th after it stay whole.*at most 0\.75 \(keep at least 0\.25"
    for asked in ({"ratio": 0.8}, {"keep": 0.2}, {"ratio": [0.5, 0.9]}):
        with pytest.raises(ConfigError, match=says):
            load_recipe("dycoke", **asked)
    assert TemporalWindows().fewest(16, (Tile(4, 2, 2),)) == 4
    assert TemporalWindows().fewest(12, (Tile(2, 2, 3),)) == 6
    for tiles, current in [((), 16), ((Tile(4, 2, 2),), 12), ((Tile(2, 2, 2), Tile(2, 1, 4)), 16)]:
        with pytest.raises(UnsupportedInputError, match="whole frames of one size"):
            TemporalWindows().count(current, 8, tiles)


def decode(drop=0.5):
    (step,) = [s for s in load_recipe("dycoke", drop=drop).steps if s.reducer == "decode_refresh"]
    reducer = build_reducer(step)
    assert isinstance(reducer, DecodeRefresh)
    return reducer


def test_refresh_worked_example():
    reducer, mask = decode(), torch.ones(1, 4, dtype=torch.bool)
    kept, row = reducer.refresh(torch.tensor([[0.1, 0.4, 0.3, 0.2]]), None, None, mask)
    assert chosen(kept) == [1, 2]
    again, row = reducer.refresh(torch.tensor([[0.1, 0.39, 0.31, 0.2]]), row, kept, mask)
    assert torch.equal(again, kept)
    new, row = reducer.refresh(torch.tensor([[0.5, 0.1, 0.1, 0.3]]), row, again, mask)
    assert chosen(new) == [0, 3]
    assert row.tolist() == torch.tensor([[0.5, 0.1, 0.1, 0.3]]).tolist()


def test_refresh_reuses_a_choice_that_a_ranking_would_change():
    reducer, mask = decode(), torch.ones(1, 4, dtype=torch.bool)
    kept, row = reducer.refresh(torch.tensor([[0.24, 0.26, 0.25, 0.25]]), None, None, mask)
    assert chosen(kept) == [1, 2]
    kept, _ = reducer.refresh(torch.tensor([[0.26, 0.24, 0.25, 0.25]]), row, kept, mask)
    assert chosen(kept) == [1, 2]


def test_refresh_decides_row_by_row_and_ignores_padding():
    reducer = decode(0.8)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[2, 3:] = False
    first = torch.rand(3, 10)
    first[2, 3:] = float("nan")
    kept, stored = reducer.refresh(first, None, None, mask)
    assert kept.sum(1).tolist() == [2, 2, 1]  # 10 * (1 - 0.8) is 1.9999999999999996
    second = first.clone()
    second[1] = first[1].max() - first[1]
    after, stored = reducer.refresh(second.bfloat16(), stored, kept, mask)
    assert torch.equal(after[[0, 2]], kept[[0, 2]])
    assert chosen(after, 1) == sorted(rules.best(second[1].bfloat16().tolist(), range(10), 2))
    assert stored.dtype == torch.float32


def test_decode_refresh_has_no_prefill_rule():
    with pytest.raises(NotImplementedError, match="refresh"):
        DecodeRefresh().reduce(visual_tokens([torch.randn(3, 2)], [1]))
