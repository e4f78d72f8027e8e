"""Methods that choose by what words are like: worked examples by hand, and literal slow versions on random inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference.build import circle

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.needs import Features, Normed, Projection, Rotary


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sides(visual: torch.Tensor, text: torch.Tensor, keys: torch.Tensor | None = None) -> dict[Any, torch.Tensor]:
    signals: dict[Any, torch.Tensor] = {Normed(): visual, Normed("text"): text}
    return signals if keys is None else signals | {Projection("key", of="text"): keys}


# MoB


def test_mob_by_hand():
    """Words at 10 and 85 degrees are near to {0, 1} and {3, 2}: 3 and 0 cover them; then 5, the farthest, and 2."""
    visual, text = circle(0, 20.1, 45, 90, 135.1, 180), circle(10, 85)
    given = {"signals": sides(visual, text), "nearest": 1.0}
    assert squeeze.choose("mob", keep=2, share=1.0, **given).kept.tolist() == [0, 3]
    assert squeeze.choose("mob", keep=3, share=0.7, **given).kept.tolist() == [0, 3, 5]
    assert squeeze.choose("mob", keep=4, share=0.5, **given).kept.tolist() == [0, 2, 3, 5]


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True)


def paper(visual: torch.Tensor, text: torch.Tensor, count: int, share: float, nearest: float) -> list[int]:
    """Both stages of the paper, one token after the other."""
    prompted = math.floor(share * count)
    each = max(1, math.floor(nearest * prompted))
    alike = unit(text) @ unit(visual).T
    best: dict[int, float] = {}
    for row in alike:
        for token in row.argsort(descending=True)[:each].tolist():
            best[token] = max(best.get(token, -2.0), float(row[token]))
    keep = sorted(best, key=lambda token: -best[token])[:prompted]
    v = unit(visual)
    while len(keep) < count:
        far = (1 - v @ v[keep].T).amin(1)
        far[keep] = -1
        keep.append(int(far.argmax()))
    return sorted(keep)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "share", "nearest"), [(12, 0.5, 0.125), (9, 0.7, 0.4), (20, 1.0, 0.1)])
def test_mob_is_its_paper(seed, count, share, nearest):
    visual, text = noise(40, 8, seed=seed), noise(6, 8, seed=seed + 30)
    choice = squeeze.choose("mob", signals=sides(visual, text), keep=count, share=share, nearest=nearest)
    assert choice.kept.tolist() == paper(visual, text, count, share, nearest)
    assert len(choice.kept) == count


def official(visual, text, keys, count, share, nearest, samples) -> list[int]:
    """What the authors' code does for LLaVA, word by word."""
    prompted = math.floor(share * count)
    each = math.floor(nearest * prompted)
    length = keys.abs().sum(1)
    longest = length.argsort(descending=True, stable=True)[:samples]
    alike, best, asked = unit(text)[longest] @ unit(visual).T, {}, 0
    for row, own in zip(alike, length[longest], strict=True):
        number = max(each, math.ceil(each * samples / float(length[longest].sum()) * float(own)))
        asked += number
        for token in row.argsort(descending=True)[:number].tolist():
            best[token] = max(best.get(token, -2.0), float(row[token] + own))
    keep = sorted(best, key=lambda token: -best[token])[: math.ceil(prompted / (each * samples) * asked)]
    v = unit(visual)
    for _ in range(count - prompted):
        far = (1 - v @ v[keep].T).amin(1)
        far[keep] = -1
        keep.append(int(far.argmax()))
    return sorted(keep)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [24, 40])
def test_mob_official_is_its_code(seed, count):
    visual, text, keys = noise(90, 8, seed=seed), noise(14, 8, seed=seed + 30), noise(14, 6, seed=seed + 60)
    choice = squeeze.choose("mob", variant="official", signals=sides(visual, text, keys), keep=count)
    assert choice.kept.tolist() == official(visual, text, keys, count, 0.5, 0.125, 8)


def qwen(visual, text, count, share, mix) -> list[int]:
    """What the authors' code does for Qwen2-VL."""
    prompted = round(count * share)
    v = torch.nn.functional.normalize(visual, dim=1)
    alike = (torch.nn.functional.normalize(text, dim=1) @ v.T).amax(0)
    taken = set(alike.argsort(descending=True)[:prompted].tolist())
    nearest, pick = torch.full((len(v),), torch.inf), int(v.norm(dim=1).argmax())
    for _ in range(count - prompted):
        taken.add(pick)
        nearest = torch.minimum(nearest, 1 - v @ v[pick])
        pick = int(nearest.argmax())

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return (x - x.min()) / (x.max() - x.min())

    worth = mix * scaled(alike) + (1 - mix) * scaled(nearest)
    rest = sorted(set(range(len(v))) - taken, key=lambda token: -float(worth[token]))
    return sorted([*taken, *rest[: count - len(taken)]])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("share", "mix"), [(0.5, 0.5), (0.3, 0.9), (0.0, 0.2)])
def test_mob_qwen_is_its_code(seed, share, mix):
    visual, text = noise(50, 8, seed=seed), noise(7, 8, seed=seed + 30)
    choice = squeeze.choose(
        "mob", variant="qwen", features=visual, signals={Features(of="text"): text}, keep=15, share=share, mix=mix
    )
    assert choice.kept.tolist() == qwen(visual, text, 15, share, mix)


@pytest.mark.parametrize("variant", ["paper", "official", "qwen"])
def test_mob_takes_a_batch_as_singles(variant):
    visual, text, keys = noise(2, 30, 8, seed=1), noise(2, 9, 8, seed=2), noise(2, 9, 6, seed=3)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 22:] = False

    def kept(rows: Any, mask: torch.Tensor) -> Any:
        x, t, k = visual[rows], text[rows], keys[rows]
        if x.ndim == 2:
            x = x[: int(mask.sum())]
            mask = None
        given = (
            {"features": x, "signals": {Features(of="text"): t}}
            if variant == "qwen"
            else {"signals": sides(x, t, k if variant == "official" else None)}
        )
        return squeeze.choose("mob", variant=variant, mask=mask, keep=8, **given).kept

    both = kept(slice(None), mask)
    for row in range(2):
        assert both[row].tolist() == kept(row, mask[row]).tolist()


@pytest.mark.parametrize("variant", ["paper", "official", "qwen"])
def test_mob_keeps_all_at_ratio_0(variant):
    visual, text, keys = noise(12, 8), noise(9, 8, seed=2), noise(9, 6, seed=3)
    signals = {Features(of="text"): text} if variant == "qwen" else sides(visual, text, keys)
    signals = {k: v for k, v in signals.items() if variant == "official" or not isinstance(k, Projection)}
    given = {"features": visual} if variant == "qwen" else {}
    choice = squeeze.choose("mob", variant=variant, signals=signals, keep=12, **given)
    assert choice.kept.tolist() == list(range(12))


def test_mob_without_a_word_covers_the_picture():
    x, mask = noise(1, 9, 4), torch.ones(1, 9, dtype=torch.bool)
    words = torch.zeros(1, 3, dtype=torch.bool)
    each, count = torch.full((1, 3), 2), torch.tensor([4])
    seeds = ops.nearest_to_words(x, mask, noise(1, 3, 4), words, each, count)
    assert not seeds.any()
    keep = ops.farthest_from(x, mask, seeds, torch.tensor([5]), 9, 9)
    assert keep.sum() == 5
    assert keep[0, 0]


# HAWK


def hawk(query: torch.Tensor, key: torch.Tensor, **params: Any) -> Any:
    """Run it on queries (T, H, d) and keys (N, Hkv, d), or batches of them."""
    needs = load_recipe("hawk").steps[0].built.needs()
    return squeeze.choose("hawk", signals=dict(zip(needs, (query, key), strict=True)), **params)


def test_hawk_by_hand():
    """Heads [3 0 4] and [1 2 2] of length 1 are [.6 0 .8] and [.33 .67 .67]; weighted they are .4 .5 .7."""
    key = torch.tensor([[3.0, 1.0], [0.0, 2.0], [4.0, 2.0]])[..., None]
    query = torch.ones(1, 2, 1)
    assert hawk(query, key, keep=2, weights=[0.25, 0.75]).kept.tolist() == [1, 2]
    assert hawk(query, key, keep=2, weights=[1.0, 0.0]).kept.tolist() == [0, 2]
    assert hawk(query, key, keep=1).kept.tolist() == [2]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["l2", "softmax", "minmax", "none"])
def test_hawk_is_its_loops(seed, how):
    query, key, weights = noise(5, 4, 6, seed=seed), noise(20, 2, 6, seed=seed + 9), noise(4, seed=seed + 20).abs()
    scores = torch.zeros(20)
    for head in range(4):
        row = torch.stack([sum(query[t, head] @ key[n, head // 2] for t in range(5)) / 5 for n in range(20)]) / 6**0.5
        if how == "l2":
            row = row / row.norm()
        elif how == "softmax":
            row = row.softmax(0)
        elif how == "minmax":
            row = (row - row.min()) / (row.max() - row.min())
        scores += weights[head] * row
    best = scores.argsort(descending=True)[:7].sort().values
    assert hawk(query, key, keep=7, weights=weights.tolist(), normalise=how).kept.tolist() == best.tolist()


def test_hawk_takes_a_batch_as_singles_and_words_by_their_mask():
    query, key = noise(2, 5, 4, 6), noise(2, 20, 2, 6, seed=1)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 13:] = False
    both = hawk(query, key, keep=6, mask=mask).kept
    assert both[0].tolist() == hawk(query[0], key[0], keep=6).kept.tolist()
    assert both[1].tolist() == hawk(query[1], key[1, :13], keep=6).kept.tolist()
    words = torch.tensor([[True, True, False, True, False]])
    some = ops.query_key_products(query[:1], words, key[:1])
    assert torch.allclose(
        some, ops.query_key_products(query[:1, words[0]], torch.ones(1, 3, dtype=torch.bool), key[:1])
    )


def test_hawk_wants_a_weight_per_head():
    with pytest.raises(UnsupportedInputError, match="3 weights are given, and the layer has 4 heads"):
        hawk(noise(5, 4, 6), noise(20, 2, 6), keep=3, weights=[1.0, 1.0, 1.0])


# IVC-Prune


def ivc(values: torch.Tensor, start: int, count: int, turned: torch.Tensor, **params: Any) -> Any:
    """Run it on values (M, H, d) of a prompt with the picture at `start`, and cosines and sines (N, 2 d)."""
    signals: dict[Any, Any] = {
        Projection("value", heads="each"): values[start : start + count],
        Projection("value", of="text", heads="each"): values[start + count :],
        Rotary(): turned,
    }
    if params.get("variant") == "llava":
        signals[Projection("value", of="all", heads="each")] = values
        params["among"] = start
    recipe: Any = "ivc_prune"
    if params.pop("counts", False):
        recipe = load_recipe("ivc_prune").to_dict()
        recipe["params"]["ratio"] = None
    return squeeze.choose(recipe, signals=signals, **params)


def turned(count: int, start: int = 0, width: int = 4) -> torch.Tensor:
    angle = torch.arange(start, start + count)[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    angle = torch.cat([angle, angle], 1)
    return torch.cat([angle.cos(), angle.sin()], 1)


def test_coordinates_by_hand():
    """Of eight places those of largest mean cosine are 0 and 6, of largest mean sine 2 and 1."""
    tables = turned(8)
    assert tables[:, :4].mean(1).tolist() == pytest.approx(
        [1, 0.770, 0.292, 0.005, 0.173, 0.641, 0.979, 0.876], abs=1e-3
    )
    values = torch.zeros(9, 1, 2)
    values[4, 0, 0] = values[8, 0, 0] = 1.0
    # The seed is 4, the one token that is like the word; of the others the first is next.
    choice = ivc(values, 0, 8, tables, keep=6, axis=0.25)
    # A fifth of six is one coordinate of each kind.
    assert choice.kept.tolist() == [0, 1, 2, 3, 4, 5]
    assert ivc(values, 0, 8, tables, keep=3, axis=0.25).kept.tolist() == [0, 2, 4]


def ivc_by_loops(values, start, count, tables, target, axis, seeds, over_all, best) -> list[int]:
    visual, text = values[start : start + count], values[start + count :]
    heads, width = values.shape[1], values.shape[2]

    def rows(of: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(of), count)
        for n, row in enumerate(of):
            for head in range(heads):
                others = values[:, head] if over_all else visual[:, head]
                share = (others @ row[head] / width**0.5).softmax(0)
                out[n] += (share[start : start + count] if over_all else share) / heads
        return out

    asked = rows(text)
    chosen = asked.mean(0).argsort(descending=True, stable=True)[: max(1, round(seeds * count))]
    likeness = torch.cat([asked, rows(visual[chosen])]).mean(0)
    half = tables.shape[1] // 2
    number = round(axis * count) if target is None else min(round(axis * count), round(0.2 * target))
    marks = set()
    for table in (tables[:, :half], tables[:, half:]):
        marks |= set(table.mean(1).argsort(descending=True, stable=True)[:number].tolist())
    order = likeness.argsort(descending=True, stable=True).tolist()
    if target is None:
        return sorted(marks | set(order[: round(best * count)]))
    first = [*chosen.tolist(), *sorted(marks, key=order.index)]
    return sorted(list(dict.fromkeys([*first, *order]))[:target])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", [32, 12, 5])
def test_ivc_prune_is_its_loops(seed, target):
    values, tables = noise(76, 3, 4, seed=seed) * 2, turned(64, start=4)
    choice = ivc(values, 4, 64, tables, keep=target)
    assert choice.kept.tolist() == ivc_by_loops(values, 4, 64, tables, target, 0.1, 0.01, False, 0.2)


@pytest.mark.parametrize("seed", range(3))
def test_ivc_prune_for_llava_is_its_loops(seed):
    values, tables = noise(76, 3, 4, seed=seed) * 2, turned(64, start=4)
    choice = ivc(values, 4, 64, tables, variant="llava", counts=True, axis=0.05)
    assert choice.kept.tolist() == ivc_by_loops(values, 4, 64, tables, None, 0.05, 0.01, True, 0.2)
    asked = ivc(values, 4, 64, tables, variant="llava", keep=20, axis=0.05)
    assert len(asked.kept) == 20
