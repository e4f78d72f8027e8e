"""Methods for videos with sound: worked examples by hand, and literal slow versions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from golden.read_sound_and_video import as_spans, pieces_of
from mllm_squeeze import ops
from mllm_squeeze.layout import Tile
from mllm_squeeze.reducers.base import Mix, Reduction, Signals, VisualTokens
from mllm_squeeze.reducers.needs import Features
from mllm_squeeze.reducers.sound_guided import SoundGuided


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Shares of blocks


def test_shares_of_blocks_by_hand():
    """.67, .55 and .43 are 1.65 of 1.8: the middle one makes up for it; of two blocks none does."""
    found = ops.block_shares([0.2, 0.5, 0.8], [4, 4, 4], 0.6, 0.35, 0.75)
    assert found == pytest.approx([0.67, 0.70, 0.43])
    assert ops.block_shares([0.2, 0.8], [4, 4], 0.6, 0.35, 0.75) == pytest.approx([0.67, 0.43])
    assert ops.block_shares([], [], 0.6, 0.35, 0.75) == ()
    # Asked to meet .6 of the whole, both are scaled by 1.2 / 1.1.
    assert ops.block_shares([0.2, 0.8], [4, 4], 0.6, 0.35, 0.75, meet=True) == pytest.approx([0.731, 0.469], abs=1e-3)
    assert ops.block_shares([0.9], [4], 0.6, 0.35, 0.75, meet=True) == pytest.approx([0.6])
    # All alike: the first one stays as it is, and the others are scaled.
    assert ops.block_shares([0.5] * 3, [2, 2, 2], 0.6, 0.35, 0.75) == pytest.approx([0.55, 0.625, 0.625])


@pytest.mark.parametrize("seed", range(6))
def test_shares_of_blocks_meet_the_whole_within_their_bounds(seed):
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(7, generator=draw).tolist()
    sizes = torch.randint(4, 40, (7,), generator=draw).tolist()
    found = ops.block_shares(kept, sizes, 0.6, 0.35, 0.75)
    assert all(0.35 <= one <= 0.75 for one in found)
    first, last = kept.index(max(kept)), kept.index(min(kept))
    assert found[first] == pytest.approx(0.75 - 0.4 * kept[first])
    assert found[last] == pytest.approx(0.75 - 0.4 * kept[last])
    gone = sum(share * size for share, size in zip(found, sizes, strict=True))
    middle = [one for n, one in enumerate(found) if n not in (first, last)]
    if all(0.36 < one < 0.74 for one in middle):
        assert gone == pytest.approx(0.6 * sum(sizes))


# Peaks


def peaks_by_loops(x: torch.Tensor, neighbours: int) -> list[float]:
    number = len(x)
    far = [
        [max(0.0, 1 - float(torch.cosine_similarity(x[i].double(), x[j].double(), dim=0))) for j in range(number)]
        for i in range(number)
    ]
    density = []
    for i in range(number):
        near = sorted(far[i][j] for j in range(number) if j != i)[:neighbours]
        density.append(math.exp(-sum(near) / max(1, len(near))))
    worth = []
    for i in range(number):
        gaps = [far[i][j] for j in range(number) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        worth.append(density[i] * (min(gaps) if gaps else max(far[i])))
    return worth


@pytest.mark.parametrize("shape", [(3, 16, 5), (1, 4, 3), (2, 1, 3), (2, 2, 3)])
def test_lone_peaks_are_their_loops(shape):
    x = noise(*shape, seed=sum(shape))
    expected = torch.tensor([peaks_by_loops(frame, 5) for frame in x])
    torch.testing.assert_close(ops.lone_peaks(x, 5), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ops.lone_peaks(x[:1], 5), expected[:1], atol=1e-5, rtol=1e-4)


def test_of_equal_tokens_the_first_is_the_peak():
    assert ops.lone_peaks(torch.ones(1, 4, 3), 5).abs().max() < 1e-6
    two = torch.eye(2)[torch.tensor([0, 0, 1, 1])][None]
    worth = ops.lone_peaks(two, 1)[0]
    assert worth[0] > 0 and worth[2] > 0
    assert worth[1] == worth[3] == 0


# Merging over rows


def test_a_token_goes_into_one_of_another_row():
    """Token 0 of row 0 becomes the mean of itself and token 1 of row 1, which is dropped there."""
    x = noise(2, 3, 4)
    keep = torch.tensor([[True, True, True], [True, False, True]])
    zero = torch.zeros(2, dtype=torch.long)
    mix = Mix(zero, zero, torch.tensor([0, 1]), torch.tensor([0.5, 0.5]), torch.tensor([0, 1]))
    found = Reduction(keep, mix=mix)
    expected = x.clone()
    expected[0, 0] = (x[0, 0] + x[1, 1]) / 2
    torch.testing.assert_close(found.states(x)[keep], expected[keep])
    assert found.sizes(torch.ones(2, 3))[keep].tolist() == [2, 1, 1, 1, 1]
    assert found.targets().tolist() == [[0, 1, 2], [0, -1, 2]]


# OmniZip


def prompt(layout: str, tile: Tile, seed: int = 0) -> tuple[VisualTokens, str]:
    """Return what a rule sees of a prompt of letters: v for video, a for sound, anything else is text."""
    states, heard = noise(len(layout), 6, seed=seed), noise(layout.count("a"), seed=seed + 1).abs()
    sound, video = (torch.tensor([one == letter for one in layout]) for letter in "av")
    return as_spans(states, heard, [*pieces_of(sound), video.nonzero().flatten()], tile), layout


def likeness(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


def runs_of(layout: str, letter: str) -> list[list[int]]:
    """Return the numbers, among the tokens of a letter, that stand in each run of it."""
    runs: list[list[int]] = []
    number = 0
    for place, one in enumerate(layout):
        if one == letter:
            if place == 0 or layout[place - 1] != letter:
                runs.append([])
            runs[-1].append(number)
            number += 1
    return runs


def omnizip_by_loops(tokens: VisualTokens, layout: str, rule: SoundGuided, frame: int) -> tuple[Any, Any, Any]:
    """Return the kept sound, the kept video, and the states of the sound; frame: tokens of a frame of the video."""
    from mllm_squeeze.reducers.needs import SoundAttention

    sounds = range(len(tokens.lengths) - 1)
    x = torch.cat([tokens.features[row, : tokens.lengths[row]] for row in sounds])
    heard = torch.cat([tokens[SoundAttention()][row, : tokens.lengths[row]] for row in sounds]).tolist()
    film = tokens.features[-1, : tokens.lengths[-1]]
    order = sorted(range(len(x)), key=lambda n: (-heard[n], n))
    kept = set(order[: round((1 - rule.sound) * len(x))])
    rest = [n for n in range(len(x)) if n not in kept]
    wanted = round(rule.context * len(x)) if rule.members else 0
    anchors = rest[:: max(1, len(rest) // wanted)][:wanted] if wanted and rest else []
    members: dict[int, list[tuple[float, int]]] = {anchor: [] for anchor in anchors}
    for n in rest:
        if anchors and n not in anchors:
            best = max(anchors, key=lambda anchor: (likeness(x[n], x[anchor]), -anchor))
            members[best].append((max(likeness(x[n], one) for one in film), n))
    states = x.clone()
    for anchor, group in members.items():
        group = sorted(group, key=lambda one: (-one[0], one[1]))[: rule.members]
        if group:
            weights = [math.exp(score) for score, _ in group]
            mean = sum(w * x[n] for w, (_, n) in zip(weights, group, strict=True)) / sum(weights)
            states[anchor] = (x[anchor] + mean) / 2
    kept |= set(anchors)
    blocks, guides = runs_of(layout, "v"), runs_of(layout, "a")
    stay = [sum(n in kept for n in guide) / len(guide) for guide in guides][: len(blocks)]
    sizes = [len(block) for block in blocks]
    shares = [*ops.block_shares(stay, sizes[: len(stay)], rule.video, rule.lowest, rule.highest)]
    shares += [rule.video] * (len(blocks) - len(shares))
    film_kept = []
    for block, share in zip(blocks, shares, strict=True):
        count = max(1, int(frame * (1 - share) + 1e-9))
        for t, start in enumerate(range(block[0], block[-1] + 1, frame)):
            if t % 2 == 0:
                worth = peaks_by_loops(film[start : start + frame], 5)
            else:
                worth = [-likeness(film[start + n], film[start - frame + n]) for n in range(frame)]
            best = sorted(range(frame), key=lambda n: (-worth[n], n))[:count]
            film_kept += [start + n for n in best]
    return sorted(kept), sorted(film_kept), states


LAYOUTS = {
    "between": "tt" + ("v" * 24 + "a" * 9) * 4 + "tt",
    "uneven": "v" * 12 + "a" * 5 + "v" * 36 + "a" * 20 + "v" * 24 + "a" * 2 + "v" * 24,
    "behind": "t" + "v" * 96 + "t" + "a" * 23,
    "more sound": ("a" * 7 + "v" * 48) * 2 + "a" * 12,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [{}, {"sound": 0.6, "context": 0.1, "members": 2}, {"video": 0.4, "members": 0}])
def test_omnizip_is_its_loops(layout, given):
    rule = SoundGuided(**given)
    tokens, letters = prompt(LAYOUTS[layout], Tile(8, 3, 4), seed=len(layout))
    found = rule.reduce(tokens)
    kept, film, states = omnizip_by_loops(tokens, letters, rule, 12)
    sounds = range(len(tokens.lengths) - 1)
    assert torch.cat([found.keep[row, : tokens.lengths[row]] for row in sounds]).nonzero().flatten().tolist() == kept
    assert found.keep[-1].nonzero().flatten().tolist() == film
    got = torch.cat([found.states(tokens.features)[row, : tokens.lengths[row]] for row in sounds])
    torch.testing.assert_close(got[kept], states[kept])


def test_an_anchor_by_hand():
    """20 tokens: 14 are heard best, one of the other six is an anchor, and takes up three of five."""
    tokens, _ = prompt("v" * 4 + "a" * 20, Tile(1, 2, 2))
    found = SoundGuided().reduce(tokens)
    assert found.keep[0].sum() == 15
    assert found.mix is not None
    assert len(found.mix.weight) == 4
    assert found.mix.weight[0] == 0.5
    assert found.mix.weight.sum() == pytest.approx(1)


@pytest.mark.parametrize("layout", ["v" * 48, "a" * 30, "a", "v" * 12, "v" * 12 + "a"])
def test_sound_or_video_alone(layout):
    frames = layout.count("v") // 12
    states, count = noise(len(layout), 6), layout.count("a")
    pieces = [torch.arange(len(layout))[torch.tensor([one == letter for one in layout])] for letter in "av"]
    tile = Tile(max(frames, 1), 3, 4 if frames else 1)
    tokens = as_spans(states, noise(count).abs(), pieces, tile) if frames else None
    if tokens is None:
        whole, _ = prompt("v" * 12 + layout, Tile(1, 3, 4))
        tokens = of_rows(whole, [0])
    elif not count:
        tokens = of_rows(tokens, [1])
    found = SoundGuided().reduce(tokens)
    if count:
        assert int(found.keep[0].sum()) == round(0.7 * count) + round(0.05 * count)
    if frames:
        # A video without sound loses its share, one beside a single token, which stays, the least.
        each = 7 if count else 4
        assert int(found.keep[-1].sum()) == each * frames


def of_rows(tokens: VisualTokens, rows: list[int]) -> VisualTokens:
    names = ("tiles", "current", "counts", "lengths", "sample", "modality")
    told = {name: tuple(getattr(tokens, name)[row] for row in rows) for name in names}
    signals = Signals({need: value[rows] for need, value in tokens.signals.items()})
    held = {name: getattr(tokens, name)[rows] for name in ("mask", "grid", "origin", "budget")}
    return replace(tokens, signals=signals, **told, **held)


@pytest.mark.parametrize("layout", ["between", "behind"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9])
def test_a_budget_is_the_share_of_the_video(ratio, layout):
    """Bounds give way to what is asked for; of the sound half of the share leaves, and anchors come back."""
    tokens, _ = prompt(LAYOUTS[layout], Tile(8, 3, 4))
    sound = sum(tokens.lengths[:-1])
    counts = tuple(ops.kept_count(n, ratio) for n in tokens.lengths)
    found = SoundGuided().reduce(replace(tokens, asked=True, counts=counts, budget=torch.tensor(counts)))
    left = found.keep.sum(1).tolist()
    if not ratio:
        assert left == list(tokens.lengths)
        return
    heard = round((1 - (1 - sum(counts[:-1]) / sound) / 2) * sound)
    assert sum(left[:-1]) == heard + min(round(0.05 * sound), sound - heard)
    # Each frame rounds down.
    assert (1 - ratio) * 96 - 8 <= left[-1] <= (1 - ratio) * 96 + 1


def test_two_prompts_are_what_each_is_alone():
    one, _ = prompt(LAYOUTS["between"], Tile(8, 3, 4), seed=1)
    other, _ = prompt(LAYOUTS["uneven"], Tile(8, 3, 4), seed=2)
    width = max(one.mask.shape[1], other.mask.shape[1]) + 3

    def wide(x: torch.Tensor, fill: float) -> torch.Tensor:
        out = torch.full((len(x), width, *x.shape[2:]), fill, dtype=x.dtype)
        out[:, : x.shape[1]] = x
        return out

    def joined(name: str, fill: float) -> torch.Tensor:
        return torch.cat([wide(getattr(tokens, name), fill) for tokens in (one, other)])

    def told(name: str) -> Any:
        return getattr(one, name) + getattr(other, name)

    fills = {need: float("nan") if one[need].is_floating_point() else 0 for need in one.signals}
    both = replace(
        one,
        mask=joined("mask", False),
        grid=joined("grid", -1),
        origin=joined("origin", 0),
        budget=torch.cat([one.budget, other.budget]),
        signals=Signals({n: torch.cat([wide(t[n], fill) for t in (one, other)]) for n, fill in fills.items()}),
        sample=(0,) * len(one.sample) + (1,) * len(other.sample),
        **{name: told(name) for name in ("tiles", "current", "counts", "lengths", "modality")},
    )
    found = SoundGuided().reduce(both)
    states = found.states(both[Features()])
    rows = 0
    for tokens in (one, other):
        alone = SoundGuided().reduce(tokens)
        size = alone.keep.shape
        mine = slice(rows, rows + size[0])
        assert torch.equal(found.keep[mine, : size[1]], alone.keep)
        assert not found.keep[mine, size[1] :].any()
        kept = alone.states(tokens[Features()])[alone.keep]
        torch.testing.assert_close(states[mine, : size[1]][alone.keep], kept)
        rows += size[0]
