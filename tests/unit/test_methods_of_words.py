"""Methods that choose by what words are like: worked examples by hand, and literal slow versions on random inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference.build import circle

import mllm_squeeze as squeeze
from mllm_squeeze.reducers.needs import Features, Normed, Projection


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
    from mllm_squeeze import ops

    x, mask = noise(1, 9, 4), torch.ones(1, 9, dtype=torch.bool)
    words = torch.zeros(1, 3, dtype=torch.bool)
    each, count = torch.full((1, 3), 2), torch.tensor([4])
    seeds = ops.nearest_to_words(x, mask, noise(1, 3, 4), words, each, count)
    assert not seeds.any()
    keep = ops.farthest_from(x, mask, seeds, torch.tensor([5]), 9, 9)
    assert keep.sum() == 5
    assert keep[0, 0]
