"""Image methods: the worked examples of their specs by hand, and literal slow versions on random inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference.build import circle

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.layout import Tile
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.needs import Embedding


def needs_of(method: str) -> tuple[Any, ...]:
    return load_recipe(method).steps[0].built.needs()


def there(count: int) -> torch.Tensor:
    return torch.ones(1, count, dtype=torch.bool)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(method: str | dict[str, Any], **given: Any) -> list[int]:
    return squeeze.choose(method, **given).kept.tolist()


# SCOPE


def test_scope_by_hand():
    """Coverage times weight: .9939 .7883 .2909 .3532 -> 0, then .0474 .1266 .2532 -> 3."""
    signals = {"encoder_attention": torch.tensor([0.4, 0.3, 0.1, 0.2]), "encoder_states": circle(0, 10, 60, 100)}
    assert kept("scope", signals=signals, keep=2) == [0, 3]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_scope_is_its_loop(seed, alpha):
    x, weight = noise(30, 6, seed=seed), noise(30, seed=seed + 9).abs()
    alike = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(x, dim=1).T
    covered, picks = torch.zeros(30), []
    for _ in range(9):
        gains = [float((alike[:, c] - covered).clamp(min=0).sum() * weight[c] ** alpha) for c in range(30)]
        best = max((c for c in range(30) if c not in picks), key=lambda c: (round(gains[c], 5), -c))
        picks.append(best)
        covered = torch.maximum(covered, alike[:, best])
    assert kept("scope", signals={"encoder_attention": weight, "encoder_states": x}, keep=9, alpha=alpha) == sorted(
        picks
    )


# SCoRe


def test_score_kcenter_by_hand():
    """Weights .4 .3 .1 .2 begin with 0; distances 0 .0152 .5 1.1736 times weight ** .8 lead to 3, then to 2."""
    signals = {"encoder_attention": torch.tensor([0.4, 0.3, 0.1, 0.2]), "encoder_states": circle(0, 10, 60, 100)}
    assert kept("score_kcenter", signals=signals, keep=2) == [0, 3]
    assert kept("score_kcenter", signals=signals, keep=3) == [0, 2, 3]


@pytest.mark.parametrize("seed", range(4))
def test_score_kcenter_is_its_loop(seed):
    x, weight = noise(40, 5, seed=seed), noise(40, seed=seed + 9).abs()
    unit = torch.nn.functional.normalize(x, dim=1)
    picks = [int(weight.argmax())]
    distance = 1 - unit @ unit[picks[0]]
    while len(picks) < 12:
        worth = distance * weight**0.8
        worth[picks] = -1
        picks.append(int(worth.argmax()))
        distance = torch.minimum(distance, 1 - unit @ unit[picks[-1]])
    signals = {"encoder_attention": weight, "encoder_states": x}
    assert kept("score_kcenter", signals=signals, keep=12) == sorted(picks)


def test_copies_are_picked_last():
    x = circle(0, 0, 90, 90, 45)
    signals = {"encoder_attention": torch.tensor([1.0, 0.9, 0.8, 0.7, 0.1]), "encoder_states": x}
    assert kept("score_kcenter", signals=signals, keep=3) == [0, 2, 4]
    assert kept("score_kcenter", signals=signals, keep=4) == [0, 1, 2, 4]


# CDPruner


def asked(visual: torch.Tensor, text: torch.Tensor) -> dict[str, Any]:
    return {"signals": {Embedding("visual", "clip"): visual, Embedding("text", "clip"): text}, "text": text}


def test_cdpruner_by_hand():
    """Cosines .30 .10 .20 .25 turned round and scaled are 0 1 .5 .25; {1, 2} has the largest determinant, .2208."""
    cosines = torch.tensor([0.30, 0.10, 0.20, 0.25])
    visual = torch.stack([cosines, (1 - cosines.square()).sqrt()], 1)
    question = asked(visual, torch.tensor([[1.0, 0.0]]))
    assert kept("cdpruner", features=circle(0, 20, 90, 100), keep=2, **question) == [1, 2]
    # As the paper has it, relevance is 1 0 .5 .75.
    assert kept("cdpruner", features=circle(0, 20, 90, 100), keep=2, variant="paper", **question) == [0, 3]


@pytest.mark.parametrize("seed", range(3))
def test_cdpruner_grows_the_determinant_most(seed):
    features, visual, text = noise(18, 12, seed=seed), noise(18, 7, seed=seed + 20), noise(1, 7, seed=seed + 40)
    relevance = -torch.nn.functional.cosine_similarity(visual, text)
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    unit = torch.nn.functional.normalize(features, dim=1)
    kernel = (relevance[:, None] * (unit @ unit.T) * relevance).double()
    picks: list[int] = []
    for _ in range(6):
        rest = [n for n in range(18) if n not in picks]
        picks.append(max(rest, key=lambda n: float(torch.det(kernel[[*picks, n]][:, [*picks, n]]))))
    assert kept("cdpruner", features=features, keep=6, **asked(visual, text)) == sorted(picks)


def test_where_all_is_as_relevant_the_others_decide():
    """The code divides by zero; here all count alike, and the most different tokens stay."""
    question = asked(torch.ones(4, 3), torch.ones(1, 3))
    assert kept("cdpruner", features=circle(0, 1, 90, 91), keep=2, **question) == [0, 2]


# OTPrune


def test_otprune_by_hand():
    """diag(K) = 1.0047 1.0086 1.0080 1.0005 -> 1, then 1.0047 - 1.0080 1.0005 -> 2."""
    x = torch.tensor([[3.0, 0.0], [3.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
    assert kept("otprune", features=x, keep=2) == [1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_otprune_grows_the_log_determinant_most(seed):
    x = noise(20, 8, seed=seed) * torch.linspace(0.1, 3, 20)[:, None]
    y = (x / x.norm(dim=0)).double()
    s = y @ y.T
    kernel = torch.eye(20).double() + 0.01 * s @ s.T
    picks: list[int] = []
    for _ in range(7):
        rest = [n for n in range(20) if n not in picks]
        picks.append(max(rest, key=lambda n: float(torch.logdet(kernel[[*picks, n]][:, [*picks, n]]))))
    assert kept("otprune", features=x, keep=7) == sorted(picks)


# TRIM

TRIM = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])


def test_trim_by_hand():
    """Products 1 .8 0 -1, turned round: 3 and 2 stay, and the mean of the others at the place of the better, 1."""
    features = noise(4, 5)
    choice = squeeze.choose("trim", features=features, keep=3, **asked(TRIM, torch.tensor([[1.0, 0.0]])))
    assert choice.kept.tolist() == [1, 2, 3]
    torch.testing.assert_close(choice.features, torch.stack([features[:2].mean(0), features[2], features[3]]))
    straight = squeeze.choose(
        "trim", features=features, keep=3, variant="paper", **asked(TRIM, torch.tensor([[1.0, 0.0]]))
    )
    assert straight.kept.tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(4))
def test_trim_counts_what_stands_out(seed):
    visual, text = noise(60, 6, seed=seed) * 2, noise(1, 6, seed=seed + 30)
    share = (-(visual @ text[0])).softmax(0)
    low, high = torch.quantile(share.double(), 0.25), torch.quantile(share.double(), 0.75)
    number = max(1, int((share > high + 1.5 * (high - low)).sum()))
    best = share.argsort(descending=True, stable=True)
    found = kept("trim", features=noise(60, 4), **asked(visual, text))
    assert found == sorted(best[: number + 1].tolist())


# AdaptInfer


def test_adaptinfer_by_hand():
    """Weights .7 and .5 of the two words; the tokens get .19 .29 .12."""
    to_tokens, to_words = needs_of("adaptinfer")
    signals = {
        to_tokens: torch.tensor([[[0.2, 0.2, 0.1], [0.1, 0.3, 0.1]]]),
        to_words: torch.tensor([[[0.5, 0.0], [0.2, 0.3]]]),
    }
    score = ops.guided_by_words(signals[to_words][None], signals[to_tokens][None], there(2), there(3))
    torch.testing.assert_close(score, torch.tensor([[0.19, 0.29, 0.12]]))
    assert kept("adaptinfer", signals=signals, keep=2, layers=[0.5]) == [0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_adaptinfer_is_its_sums(seed):
    heads, words, tokens = 3, 5, 11
    among, received = (
        noise(heads, words, words, seed=seed).abs().tril(),
        noise(heads, words, tokens, seed=seed + 7).abs(),
    )
    expected = [
        sum(
            float(received[h, t, j])
            * (sum(float(among[h, s, t] + among[h, t, s]) for s in range(words)) - float(among[h, t, t]))
            for h in range(heads)
            for t in range(words)
        )
        for j in range(tokens)
    ]
    score = ops.guided_by_words(among[None], received[None], there(words), there(tokens))
    torch.testing.assert_close(score[0], torch.tensor(expected))


# HiPrune


def hiprune(anchors: torch.Tensor, deep: torch.Tensor, grid: Any, **params: Any) -> list[int]:
    deep_need, anchor_need = needs_of("hiprune")
    return kept("hiprune", signals={deep_need: deep, anchor_need: anchors}, grid=grid, **params)


def test_hiprune_by_hand():
    """Anchors 5 and 12 of 16; 12 has 11 to its left, behind the border, and 15 for what lies below the grid."""
    anchors = torch.zeros(16)
    anchors[5], anchors[12] = 0.9, 0.8
    deep = torch.arange(16.0)
    official = hiprune(anchors, deep, (4, 4), keep=12, alpha=0.9)
    assert official == [1, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15]
    strict = hiprune(anchors, deep, (4, 4), keep=12, alpha=0.9, variant="paper")
    assert strict == [1, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15]
    few = hiprune(anchors, -deep, (4, 4), keep=12, alpha=0.9, variant="paper")
    assert few == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13]


@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("seed", range(4))
def test_hiprune_is_its_loop(seed, variant):
    height, width, number, alpha = 5, 6, 17, 0.6
    anchors, deep = noise(30, seed=seed), noise(30, seed=seed + 5)
    found = anchors.argsort(descending=True)[: round(number * alpha / 5)].tolist()
    near: set[int] = set()
    for a in found:
        if variant == "official":
            near |= {min(max(a + step, 0), 29) for step in (-1, 1, -width, width)}
        else:
            row, column = divmod(a, width)
            places = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
            near |= {r * width + c for r, c in places if 0 <= r < height and 0 <= c < width}
    protected = set(found) | near
    rest = [n for n in deep.argsort(descending=True).tolist() if n not in protected]
    expected = sorted([*protected, *rest[: number - len(protected)]])
    assert hiprune(anchors, deep, (height, width), keep=number, alpha=alpha, variant=variant) == expected


def test_neighbours_stay_in_their_crop_and_frame():
    """Two tiles of 2x2 in one picture: the token right of the first tile's corner is in the second tile."""
    anchors = torch.tensor([0.0, 0, 0, 9, 0, 0, 0, 0])
    chosen = (anchors > 0)[None]
    grid = torch.tensor([[(n, *cell) for n in (0, 1) for cell in Tile(1, 2, 2).coordinates()]])
    one = ops.beside_on_grid(chosen, grid, torch.tensor([[0] * 4 + [1] * 4]), 2, 4, wraps=False)
    assert one[0].nonzero()[:, 0].tolist() == [1, 2]
    frames = torch.tensor([[(0, *cell) for cell in Tile(2, 2, 2).coordinates()]])
    two = ops.beside_on_grid(chosen, frames, torch.zeros(1, 8, dtype=torch.long), 1, 8, wraps=False)
    assert two[0].nonzero()[:, 0].tolist() == [1, 2]


def test_without_a_grid_there_are_no_neighbours_to_be_found():
    with pytest.raises(UnsupportedInputError, match="grid of a picture, which is not known"):
        hiprune(torch.rand(9), torch.rand(9), None, keep=3)


# HiRED


def hired(first: torch.Tensor, late: torch.Tensor, grid: Any, **params: Any) -> list[int]:
    late_need, first_need = needs_of("hired")
    return kept("hired", signals={late_need: late, first_need: first}, grid=grid, **params)


def test_hired_by_hand():
    """Marks in the upper left quarter of a 4x4 overview: bands of it are 2 2 0 0, the crops that show it 4 0 0 0."""
    tiles = [Tile(1, 4, 4), Tile(1, 8, 8)]
    first, late = torch.zeros(80), torch.ones(80)
    first[[0, 1, 4, 5]] = 1.0
    # 15 of 20 for the overview; of the 5 left, bands get floor(2.5) each, and the crop that shows the marks gets all.
    official = hired(first, late, tiles, keep=20, alpha=0.75)
    assert official == [*range(15), 16, 17, 20, 21]
    assert hired(first, late, tiles, keep=20, alpha=0.75, variant="paper") == [*range(15), 16, 17, 18, 19, 24]


@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("seed", range(4))
def test_hired_is_its_loop(seed, variant):
    side, number, alpha = 4, 37, 0.5
    rows, columns = (2, 3) if seed % 2 else (3, 1)
    crops = rows * columns
    tiles = [Tile(1, side, side), Tile(1, rows * side, columns * side)]
    total = (crops + 1) * side**2
    first, late = noise(total, seed=seed), noise(total, seed=seed + 3)
    count = side**2
    overview = min(int(number * alpha), count)
    rest = min(number - overview, crops * count)
    marks = first[:count].argsort(descending=True)[: int(count * (1 - alpha))].tolist()
    if variant == "official":
        weight = [sum(m * crops // count == c for m in marks) for c in range(crops)]
        budgets = [min(int(w / sum(weight) * rest), count) for w in weight]
    else:
        shown = [(m // side * rows // side) * columns + (m % side) * columns // side for m in marks]
        weight = [shown.count(c) for c in range(crops)]
        exact = [w * rest / sum(weight) for w in weight]
        budgets = [math.floor(e) for e in exact]
        order = sorted(range(crops), key=lambda c: (-(exact[c] - budgets[c]), c))
        for c in order[: rest - sum(budgets)]:
            budgets[c] += 1
        assert all(b <= count for b in budgets), "choose numbers that fit"
    expected = late[:count].argsort(descending=True)[:overview].tolist()
    whole = torch.arange(count, total).view(rows, side, columns, side).transpose(1, 2).reshape(crops, count)
    for crop, budget in zip(whole, budgets, strict=True):
        expected += crop[late[crop].argsort(descending=True)[:budget]].tolist()
    assert hired(first, late, tiles, keep=number, alpha=alpha, variant=variant) == sorted(expected)


def test_a_picture_without_crops_keeps_the_best():
    late = noise(16)
    assert hired(noise(16, seed=1), late, (4, 4), keep=5) == sorted(late.argsort(descending=True)[:5].tolist())


# VScan


def vscan(early: Any, deep: Any, features: torch.Tensor, size: int, **given: Any) -> squeeze.Choice:
    recipe = load_recipe("vscan").to_dict()
    for table in recipe["variants"].values():
        table["windows"]["size"] = size
    deep_need, early_need, *_ = needs_of("vscan")
    signals = {deep_need: torch.as_tensor(deep), early_need: torch.as_tensor(early)}
    return squeeze.choose(recipe, features=features, signals=signals, at="projector", **given)


def test_vscan_by_hand():
    """One of each 2x2 window by the early rows, 1 6 8 15; then 0, 12, 11 and, of equals, 2 by the deep ones."""
    early = [0.1, 0.9, 0.2, 0.3, 0.4, 0.2, 0.8, 0.1, 0.5, 0.1, 0.1, 0.1, 0.2, 0.3, 0.6, 0.7]
    deep = [0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.1, 0.1, 0.1]
    choice = vscan(early, deep, noise(16, 4), 2, grid=(4, 4), first=0.5)
    assert choice.kept.tolist() == [0, 1, 2, 6, 8, 11, 12, 15]


def test_what_vscan_drops_goes_into_the_most_alike():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    choice = vscan([1.0, 0.5, 0.1], [0.2, 1.0, 0.1], features, 6, grid=(1, 3), first=1 - 2 / 3)
    assert choice.kept.tolist() == [0, 1]
    torch.testing.assert_close(choice.features, torch.tensor([[0.95, 0.05], [0.0, 1.0]]))


@pytest.mark.parametrize("variant", ["official", "qwen"])
@pytest.mark.parametrize("seed", range(4))
def test_vscan_is_its_loop(seed, variant):
    height, width, size, number = 7, 9, 3, 30
    early, deep, features = noise(63, seed=seed), noise(63, seed=seed + 4), noise(63, 5, seed=seed + 8)
    window = [
        min(n // width // size, height // size - 1) * (width // size) + min(n % width // size, 2) for n in range(63)
    ]
    local, quota = [], number // 2
    most, least = -(-quota // 6), quota // 6
    taken = dict.fromkeys(range(6), 0)
    rounds = [(least, 6 * least), (most, quota)] if variant == "official" else [(most, quota)]
    for cap, until in rounds:
        for n in early.argsort(descending=True).tolist():
            if n not in local and taken[window[n]] < cap and len(local) < until:
                local.append(n)
                taken[window[n]] += 1
    rest = [n for n in deep.argsort(descending=True).tolist() if n not in local]
    keep = sorted([*local, *rest[: number - len(local)]])
    unit = torch.nn.functional.normalize(features, dim=1)
    groups = {k: [k] for k in keep}
    for n in range(63):
        if n not in groups:
            groups[keep[int((unit[keep] @ unit[n]).argmax())]].append(n)
    choice = vscan(early, deep, features, size, grid=(height, width), first=1 - number / 63, variant=variant)
    assert choice.kept.tolist() == keep
    torch.testing.assert_close(choice.features, torch.stack([features[groups[k]].mean(0) for k in keep]))


# M3, DeCo, bilinear pooling and the operator of Fourier-VLM

GRID = torch.arange(16.0)[:, None]


def test_pooling_by_hand():
    for method in ("m3", "deco"):
        choice = squeeze.choose(method, features=GRID, grid=(4, 4))
        assert choice.kept.tolist() == [0, 2, 8, 10]
        assert choice.features.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_fourier_by_hand():
    """The spec has 1.9239 4.1543 10.8457 13.0761, scaled so that a constant stays what it is."""
    choice = squeeze.choose("fourier_vlm", features=GRID, grid=(4, 4))
    expected = torch.tensor([1.9239, 4.1543, 10.8457, 13.0761])
    torch.testing.assert_close(choice.features.flatten(), expected, rtol=1e-4, atol=0)
    single = squeeze.choose("fourier_vlm", features=torch.tensor([[1.0], [2.0], [3.0], [4.0]]), grid=(2, 2), keep=1)
    torch.testing.assert_close(single.features, torch.tensor([[2.5]]))
    even = squeeze.choose("fourier_vlm", features=torch.full((35, 3), 7.0), grid=(5, 7), keep=12)
    torch.testing.assert_close(even.features, torch.full((12, 3), 7.0))


@pytest.mark.parametrize("frames", [1, 3])
def test_bilinear_is_what_torch_interpolates(frames):
    features = noise(frames * 35, 4)
    choice = squeeze.choose("bilinear", features=features, grid=(frames, 5, 7), keep=frames * 12)
    grid = features.view(frames, 5, 7, 4).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(grid, size=(3, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(choice.features, small.permute(0, 2, 3, 1).reshape(-1, 4))


@pytest.mark.parametrize("seed", range(3))
def test_fourier_is_the_transform_cut_and_turned_back(seed):
    features = noise(6 * 8, 2, seed=seed).double()

    def transform(x, back=False):
        size = len(x)
        table = [[math.cos(math.pi * (2 * j + 1) * k / (2 * size)) for j in range(size)] for k in range(size)]
        table = torch.tensor(table, dtype=torch.float64) * math.sqrt(2 / size)
        table[0] /= math.sqrt(2)
        return torch.tensordot(table.T if back else table, x, 1)

    grid = features.view(6, 8, 2)
    spectrum = transform(transform(grid).transpose(0, 1)).transpose(0, 1)[:3, :4]
    small = transform(transform(spectrum, True).transpose(0, 1), True).transpose(0, 1) * math.sqrt(12 / 48)
    choice = squeeze.choose("fourier_vlm", features=features.float(), grid=(6, 8), keep=12)
    torch.testing.assert_close(choice.features, small.reshape(-1, 2).float())


def test_tiles_are_resampled_one_by_one():
    features = noise(4 + 16, 3)
    choice = squeeze.choose("bilinear", features=features, grid=[Tile(1, 2, 2), Tile(1, 4, 4)], keep=5)
    small = torch.nn.functional.interpolate(features[4:].T.view(1, 3, 4, 4), size=(2, 2), mode="bilinear")
    expected = torch.cat([features[:4].mean(0, keepdim=True), small.flatten(2)[0].T])
    assert choice.kept.tolist() == [0, 4, 6, 12, 14]
    torch.testing.assert_close(choice.features, expected)


def test_a_grid_that_is_not_known_is_not_resampled():
    with pytest.raises(UnsupportedInputError, match="resampled as a whole"):
        squeeze.choose("bilinear", features=GRID, keep=4)


# CoreMatching


def test_the_elbow_by_hand():
    """Distances 0 .81 1.53 3.33 ... from the line through the ends: the cut is at 22."""
    score = torch.tensor([[90.0, 20, 85, 18, 22, 88, 15, 19]])
    assert ops.above_elbow(score, torch.zeros(1, 8, dtype=torch.long), 1).tolist() == [[3]]
    # Group by group, and what is -inf takes no part.
    both = torch.cat([score, torch.tensor([[5.0, 5, 1, -torch.inf]])], 1)
    label = torch.tensor([[0] * 8 + [1] * 4])
    assert ops.above_elbow(both, label, 2).tolist() == [[3, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_the_elbow_is_its_loop(seed):
    values = noise(23, seed=seed).tolist()
    falling = sorted(values, reverse=True)
    ends = falling[0], falling[-1]
    far = [abs(22 * (ends[0] - v) + r * (ends[1] - ends[0])) for r, v in enumerate(falling)]
    expected = sum(v > falling[far.index(max(far))] for v in values)
    found = ops.above_elbow(torch.tensor([values]), torch.zeros(1, 23, dtype=torch.long), 1)
    assert found.tolist() == [[max(expected, 1)]]


ACTIVE = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 0]])


def test_overlap_by_hand():
    """Frequencies 2 3 3 1, so the core is neurons 1 and 2."""
    none = torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.bool)
    assert ops.shared_with_core(ACTIVE[None], there(4), *none, 0.5).tolist() == [[1.0, 2.0, 2.0, 1.0]]
    words = torch.cat([ACTIVE[[0, 3]], torch.ones(3, 4), torch.zeros(1, 4)])[None]
    is_word = torch.tensor([[True] * 5 + [False]])
    assert ops.shared_with_word(ACTIVE[None], words, is_word, -5).tolist() == [[2.0, 1.0, 2.0, 0.0]]
    assert ops.shared_with_word(ACTIVE[None], words, is_word, -4).tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert ops.shared_with_word(ACTIVE[None], words, is_word, -9).tolist() == [[2.0, 1.0, 2.0, 0.0]]
    assert ops.shared_with_word(ACTIVE[None], words, is_word & False, -1).tolist() == [[0.0] * 4]


def test_corematching_keeps_what_is_above_the_bend():
    visual, text = needs_of("corematching")
    active = (torch.arange(96) < torch.tensor([90, 20, 85, 18, 22, 88, 15, 19])[:, None]).float()
    assert kept("corematching", signals={visual: active, text: torch.ones(6, 96)}) == [0, 2, 5]
    assert kept("corematching", signals={visual: active, text: torch.ones(6, 96)}, keep=2) == [0, 5]
