"""VisionTrim and what it is made of: worked examples by hand, and literal slow versions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference.build import padded, visual_tokens
from torch import Tensor

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.errors import ConfigError, UnsupportedInputError
from mllm_squeeze.layout import Tile
from mllm_squeeze.parts.base import Groups, Picks
from mllm_squeeze.parts.merge.through_text import ThroughText
from mllm_squeeze.parts.score.fused import Fused
from mllm_squeeze.parts.score.local_affinity import LocalAffinity
from mllm_squeeze.parts.score.text_similarity import TextSimilarity
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.needs import Embedding, EncoderAttention, EncoderStates, Need

VISUAL, TEXT = Embedding("visual", "clip", raw=True), Embedding("text", "clip", raw=True)
CLS, OTHERS = EncoderAttention(heads="mean"), EncoderAttention(rows="others", heads="mean")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


# What receives attention, and the scale of both


def test_the_worked_example_of_the_dominant_tokens():
    """metric [.472, .700, .396, .198]: the best two are 0 and 1."""
    score = Fused(of=load_recipe("visiontrim").steps[0].options["score"]["fused"])
    cls, rest = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.4, 0.2, 0.1])
    tokens = visual_tokens([cls[:, None]], [2], signals={CLS: [cls], OTHERS: [rest]})
    found = score.score(tokens, Groups(torch.zeros(1, 4, dtype=torch.long), 1))
    assert found[0].tolist() == pytest.approx([0.472, 0.700, 0.396, 0.198], abs=1e-3)


@pytest.mark.parametrize("block", [None, 2])
def test_attention_to_itself_is_the_diagonal(block):
    query, key = noise(2, 4, 5, 3), noise(2, 2, 5, 3, seed=1)
    allowed = ones(2, 1, 1, 5)
    allowed[1, ..., 4] = False
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, 1)) * 0.5
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    found = ops.attention_to_itself(query, key, allowed, 0.5, block=block)
    assert torch.allclose(found, weights.sum(1).diagonal(dim1=1, dim2=2), atol=1e-6)


def test_a_score_of_length_one():
    score = torch.tensor([[3.0, 4.0, -torch.inf, 99.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    found = ops.normalised(score, mask, "unit")
    assert found[0, :3].tolist() == pytest.approx([0.6, 0.8, -math.inf])
    assert found[1].tolist() == [0, 0, 0, 0]


def test_scores_that_vary_less_count_more():
    """Variances 1 and .25: weights .2 and .8."""
    scores = torch.tensor([[[1.0, 3.0]], [[2.0, 1.0]]])
    assert ops.steadied(scores, ones(1, 2)).sum(0)[0].tolist() == pytest.approx([0.2 + 1.6, 0.6 + 0.8])
    scores = torch.tensor([[[1.0, 1.0, -torch.inf]], [[2.0, 1.0, 5.0]]])
    found = ops.steadied(scores, ones(1, 3))
    assert found.sum(0)[0].tolist() == pytest.approx([1, 1, -math.inf]), "what does not vary at all counts alone"
    still = ops.steadied(torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]]]), ones(1, 2))
    assert still.sum(0)[0].tolist() == [2, 2]


# How like its neighbours a token is


def affinity_by_loops(x: Tensor, tiles: list[tuple[int, int, int]], weight: float = 0.5) -> list[float]:
    """The mean over nine cells of each token of whole tiles (frames, rows, columns)."""
    cells = [
        (n, t, h, w)
        for n, (frames, rows, columns) in enumerate(tiles)
        for t in range(frames)
        for h in range(rows)
        for w in range(columns)
    ]
    places, x = torch.tensor([cell[2:] for cell in cells]).double(), x.double()
    states = x.var().item() if x.numel() > 1 else 0
    spread = places.var().item()
    found = []
    for i, (n, t, h, w) in enumerate(cells):
        total = 0.0
        for j, other in enumerate(cells):
            if other[:2] == (n, t) and abs(other[2] - h) <= 1 and abs(other[3] - w) <= 1:
                total -= float((x[i] - x[j]).square().sum()) / states if states else 0
                total -= weight * ((other[2] - h) ** 2 + (other[3] - w) ** 2) / spread if spread else 0
        found.append(total / 9)
    return found


def affinities(xs: list[Tensor], tiles: list[tuple[Tile, ...]], width: int | None = None) -> Tensor:
    tokens = visual_tokens(xs, [1] * len(xs), tiles=tiles, signals={EncoderStates(): xs}, width=width)
    return LocalAffinity().score(tokens, Groups(tokens.mask.long() - 1, 1))


@pytest.mark.parametrize("shapes", [[(1, 1, 1)], [(1, 1, 5)], [(1, 4, 3)], [(3, 2, 3)], [(1, 2, 2), (1, 5, 3)]])
def test_affinity_is_its_loops(shapes):
    x = noise(sum(math.prod(shape) for shape in shapes), 4)
    found = affinities([x], [tuple(Tile(*shape) for shape in shapes)])[0]
    wanted = torch.tensor(affinity_by_loops(x, shapes), dtype=torch.float64).softmax(0)
    assert torch.allclose(found.double(), wanted, rtol=1e-9, atol=0)


def test_separators_are_no_neighbours_and_batches_are_singles():
    packed = Tile(1, 2, 3, row_separators=1)
    xs = [noise(8, 4), noise(12, 4, seed=1)]
    tiles = [(packed,), (Tile(1, 3, 4),)]
    both = affinities(xs, tiles, width=15)
    cells = [0, 1, 2, 4, 5, 6]
    wanted = torch.tensor(affinity_by_loops(xs[0][cells], [(1, 2, 3)])).double().softmax(0)
    assert torch.allclose(both[0, cells].double(), wanted) and both[0, 3] == both[0, 7] == -torch.inf
    assert torch.allclose(both[1, :12], affinities(xs[1:], tiles[1:])[0])


def test_affinity_asks_for_the_grid():
    with pytest.raises(UnsupportedInputError, match="which is not known here"):
        trim(noise(6, 4), grid=None, variant="paper")


# What goes into the complement


def merged_by_loops(
    x: Tensor, p: Tensor, text: Tensor, seeds: list[int], members: list[int], rounds: int, added: bool
) -> dict[int, Tensor]:
    """What the seeds become; p: the same tokens in the space of the words (a linear map of x)."""

    def cos(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30))

    now, said = {s: x[s].double() for s in seeds}, {s: p[s].double() for s in seeds}
    first, first_said = dict(now), dict(said)
    text, x, p = text.double(), x.double(), p.double()
    for _ in range(rounds):
        goes: dict[int, list[int]] = {s: [] for s in seeds}
        for m in members if seeds else ():
            alike = [sum(cos(p[m], word) * cos(said[s], word) for word in text) for s in seeds]
            goes[seeds[alike.index(max(alike))]].append(m)
        for s, taken in goes.items():
            if added and taken:
                now[s], said[s] = now[s] + x[taken].mean(0), said[s] + p[taken].mean(0)
            elif not added:
                now[s] = (first[s] + x[taken].sum(0)) / (1 + len(taken))
                said[s] = (first_said[s] + p[taken].sum(0)) / (1 + len(taken))
    return now


def entries(xs, texts, seeds, members, rounds, added, width=None):
    """Return what the op makes of a batch, given in lists."""
    number = max(len(x) for x in xs) if width is None else width
    flags = torch.zeros(2, len(xs), number, dtype=torch.bool)
    for row, (some, others) in enumerate(zip(seeds, members, strict=True)):
        flags[0, row, some], flags[1, row, others] = True, True
    words = torch.zeros(len(xs), max(len(text) for text in texts), dtype=torch.bool)
    for row, text in enumerate(texts):
        words[row, : len(text)] = True
    slots = max(1, max(len(one) for one in seeds))
    return ops.entries_through_text(padded(xs, number), padded(texts), words, *flags, slots, rounds, added)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("rounds", [1, 3])
def test_seeds_take_up_what_says_the_same(added, rounds):
    """Rows of a padded batch: two seeds of nine, one of four, and none of six."""
    xs = [noise(9, 7), noise(4, 7, seed=1), noise(6, 7, seed=2)]
    maps, texts = noise(7, 5, seed=3), [noise(3, 5, seed=4), noise(1, 5, seed=5), noise(2, 5, seed=6)]
    seeds, members = [[2, 5], [0], []], [[0, 1, 4, 6, 8], [1, 3], [0, 1]]
    ps = [x @ maps for x in xs]
    found = ops.mix_tokens(padded(xs, 11).nan_to_num(), *entries(ps, texts, seeds, members, rounds, added, 11))
    for row, x in enumerate(xs):
        wanted = {n: x[n].double() for n in range(len(x)) if n not in members[row]}
        wanted |= merged_by_loops(x, ps[row], texts[row], seeds[row], members[row], rounds, added)
        for n, state in wanted.items():
            assert torch.allclose(found[row, n].double(), state, atol=1e-5), (row, n)


def test_the_worked_example_of_the_complement():
    """Seeds 2 and 6, rest 1, 3 and 5 over three rounds: 8 and 21; the mean of all would be 2 and 5.5."""
    values = torch.tensor([2.0, 1, 3, 6, 5])
    said = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    for rounds, added, wanted in ((3, True, [8.0, 21.0]), (3, False, [2.0, 5.5]), (1, True, [4.0, 11.0])):
        found = entries([said], [torch.eye(2)], [[0, 3]], [[1, 2, 4]], rounds, added)
        states = ops.mix_tokens(values[None, :, None], *found)[0, :, 0]
        assert [float(states[0]), float(states[3])] == pytest.approx(wanted)


def test_of_seeds_that_are_alike_the_first_takes_all():
    said = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    span, into, source, weight = entries([said], [torch.eye(2)], [[0, 1]], [[2]], 1, True)
    assert {int(i) for i, s, w in zip(into, source, weight, strict=True) if s == 2 and w > 0} == {0}
    keep = torch.tensor([[True, True, False]])
    assert ops.strongest_target(keep, span, into, source, weight)[0].tolist() == [0, 1, 0]


def test_separators_take_no_part():
    x, text = noise(5, 4), noise(2, 4, seed=1)
    tokens = visual_tokens([x], [2], signals={VISUAL: [x]}, text={TEXT: [text]})
    picks = Picks(torch.tensor([[0, 1, -1, -1, -1]]), (1, 1))
    score = torch.tensor([[1.0, 1, 1, -torch.inf, 1]])
    reduction = ThroughText().merge(tokens, Groups(torch.zeros(1, 5).long(), 1), picks, score)
    assert reduction.mix is not None
    givers = {int(s) for i, s in zip(reduction.mix.into, reduction.mix.source, strict=True) if i == 1 and s != 1}
    assert givers == {2, 4}


# The method


def trim_signals(x: Tensor, seed: int = 0) -> dict[Need, Tensor]:
    return {
        CLS: noise(len(x), seed=seed + 1).abs(),
        OTHERS: noise(len(x), seed=seed + 2).abs(),
        VISUAL: x,
        TEXT: noise(3, x.shape[1], seed=seed + 3),
    }


def trim(x: Tensor, grid: Any = (4, 6), **params: Any) -> Any:
    signals: dict[Any, Tensor] = trim_signals(x)
    if params.get("space") == "llm":
        del signals[VISUAL], signals[TEXT]
        signals |= {Embedding("visual"): x, Embedding("text"): noise(3, x.shape[1], seed=3)}
    if params.get("variant") == "paper":
        del signals[OTHERS]
        signals[EncoderStates()] = x
    return squeeze.choose("visiontrim", features=x, signals=signals, grid=grid, **params)


@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("count", [1, 2, 4, 7, 23, 24])
def test_visiontrim_keeps_its_budget(count, variant):
    assert len(trim(noise(24, 5), keep=count, variant=variant).kept) == count
    assert torch.equal(trim(noise(24, 5), ratio=0, variant=variant).features[0], noise(24, 5)[0])


def test_the_language_models_own_space_may_be_asked_for():
    x = noise(24, 5)
    one, other = trim(x, keep=8, space="llm"), trim(x, keep=8)
    assert torch.equal(one.kept, other.kept) and torch.allclose(one.features, other.features)


def test_the_first_three_quarters_stay_as_they_are():
    x = noise(24, 5)
    choice = trim(x, keep=8)
    changed = [int(n) for n, state in zip(choice.kept, choice.features, strict=True) if not torch.equal(state, x[n])]
    assert len(changed) == 2
    metric = sum(ops.unit(signal) / 2 for need, signal in trim_signals(x).items() if need in (CLS, OTHERS))
    assert set(metric.topk(6).indices.tolist()) == set(choice.kept.tolist()) - set(changed)


def test_nothing_stands_in_for_single_words():
    with pytest.raises((ConfigError, ValueError), match="write one of them, or space: llm"):
        TextSimilarity(space="clip", raw=True, fallback=True)


def test_words_of_the_text_encoder_are_those_that_are_not_zero():
    x, text = noise(4, 3), noise(2, 3, seed=1)
    long = torch.cat([text, torch.zeros(3, 3)])
    found = []
    for words in (text, long):
        tokens = visual_tokens([x], [2], signals={VISUAL: [x]}, text={TEXT: [words]})
        part = TextSimilarity(space="clip", over="mean", raw=True)
        found.append(part.score(tokens, Groups(torch.zeros(1, 4).long(), 1)))
    assert torch.equal(*found)
