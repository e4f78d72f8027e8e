"""Methods that choose by places on the grid: worked examples by hand, and literal slow versions on random inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
from golden.case import Case
from golden.differences import DIFFERENCES
from golden.readings import load_all
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.layout import Tile
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.needs import EncoderStates


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(method: str, attention: torch.Tensor, states: torch.Tensor) -> dict[Any, torch.Tensor]:
    """Return the signals of the first step of a method: states of the encoder, and for all else its attention."""
    needs = load_recipe(method).steps[0].built.needs()
    return {need: states if isinstance(need, EncoderStates) else attention for need in needs}


# Nuwa


def nuwa(attention: torch.Tensor, states: torch.Tensor, grid: Any, count: int, **params: Any) -> Any:
    return squeeze.choose(
        "nuwa",
        at="projector",
        features=params.pop("features", states),
        signals=seen("nuwa", attention, states),
        grid=grid,
        first=1 - count / attention.shape[-1],
        **params,
    )


def test_nuwa_by_hand():
    """One of each cell {5 1 2 3} and {2 8 1 4}; two of each are {5 3} and {8 4}, of which three stay."""
    attention = torch.tensor([5.0, 1, 2, 8, 2, 3, 1, 4])
    assert nuwa(attention, torch.ones(8, 3), (2, 4), 1).kept.tolist() == [3]
    assert nuwa(attention, torch.ones(8, 3), (2, 4), 3, each=2).kept.tolist() == [0, 3, 7]


def test_nuwa_adds_what_lies_around_by_hand():
    """A survivor 2 and one neighbour 6 of weight .5: it counts .5 / 1.5, and 2 + 6 / 3 = 4; a mean is 10 / 3."""
    attention, states = torch.tensor([1.0, 0.5, 0.1, 9.0]), torch.eye(3)[[0, 0, 1, 1]]
    features = torch.tensor([[2.0], [6.0], [0.0], [7.0]])
    given = {"features": features, "each": 2, "radius": 0.5, "quantile": 1.0}
    choice = nuwa(attention, states, (1, 4), 2, **given)
    # The strongest stays as it is.
    assert choice.kept.tolist() == [0, 3]
    assert choice.features.flatten().tolist() == pytest.approx([4.0, 7.0], abs=1e-4)
    mean = nuwa(attention, states, (1, 4), 2, variant="qwen", **given)
    assert mean.features.flatten().tolist() == pytest.approx([10 / 3, 7.0], abs=1e-4)


def nuwa_by_loops(case: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    """Stage 1 as its spec words it, cell by cell and token by token."""
    score, height, width = case["attention"], *case["grid"]
    cells: dict[tuple[int, int], list[int]] = {}
    for token in range(height * width):
        cells.setdefault((token // width // 2, token % width // 2), []).append(token)
    candidates = [
        token for cell in cells.values() for token in sorted(cell, key=lambda t: -float(score[t]))[: case["top_n"]]
    ]
    keep = sorted(sorted(candidates, key=lambda t: -float(score[t]))[: case["n"]])
    bar, radius = float(torch.quantile(score[keep], case["quantile"])), math.sqrt(case["distance_sq"])
    tokens = []
    for i in keep:
        if float(score[i]) >= bar:
            tokens.append(case["features"][i])
            continue
        weights = []
        for j in range(height * width):
            alike = float(torch.cosine_similarity(case["sim_features"][i], case["sim_features"][j], dim=0))
            far = math.dist((i // width, i % width), (j // width, j % width))
            weights.append(max(0.0, alike) * max(0.0, 1 - far / radius))
        weights = [weight / (sum(weights) + 1e-8) for weight in weights]
        weights[i] = 1.0
        tokens.append(sum(weight * case["features"][j] for j, weight in enumerate(weights)))
    return keep, torch.stack(tokens)


def nuwa_case(seed: int, **given: Any) -> dict[str, Any]:
    case = {"grid": (6, 8), "n": 10, "top_n": 1, "quantile": 0.55, "distance_sq": 12.0} | given
    arrays = {"features": noise(48, 5, seed=seed), "sim_features": noise(48, 6, seed=seed + 50)}
    return case | arrays | {"attention": noise(48, seed=seed + 99).abs()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("given", [{}, {"n": 22, "top_n": 2, "quantile": 0.1}, {"n": 30, "top_n": 3}])
def test_nuwa_is_its_loops(seed, given):
    case = nuwa_case(seed, **given)
    choice = nuwa(
        case["attention"],
        case["sim_features"],
        case["grid"],
        case["n"],
        features=case["features"],
        each=case["top_n"],
        quantile=case["quantile"],
        radius=math.sqrt(case["distance_sq"]) / 8,
    )
    keep, tokens = nuwa_by_loops(case)
    assert choice.kept.tolist() == keep
    assert torch.allclose(choice.features, tokens, atol=1e-5)


def test_nuwa_keeps_a_budget_for_which_the_code_keeps_all():
    case = nuwa_case(0, n=40)
    wanted = DIFFERENCES["nuwa"].expected(
        Case(
            {
                name: value if isinstance(value, torch.Tensor) else torch.tensor(value).numpy()
                for name, value in case.items()
            }
        )
    )
    keep, tokens = nuwa_by_loops(case | {"top_n": 4})
    assert wanted["keep"].tolist() == keep
    assert torch.allclose(wanted["tokens"], tokens, atol=1e-5)
    assert load_all()["nuwa"](wanted)["keep"].tolist() == keep


def test_nuwa_takes_tiles_apart_and_batches_as_singles():
    attention, states = noise(2, 24, seed=3).abs(), noise(2, 24, 5, seed=4)
    tiles = [Tile(1, 2, 4), Tile(1, 4, 4)]
    both = nuwa(attention, states, tiles, 9, each=2)
    for row in range(2):
        one = nuwa(attention[row], states[row], tiles, 9, each=2)
        assert both.kept[row].tolist() == one.kept.tolist()
        assert len(one.kept) == 9
        assert torch.allclose(both.features[row], one.features, atol=1e-6)
    small = nuwa(attention[0, :8], states[0, :8], (2, 4), 3, each=2)
    # A share of 3 of 9 by size: what the other tile holds changes nothing.
    assert torch.allclose(both.features[0][:3], small.features, atol=1e-6)


def test_nuwa_needs_a_grid():
    with pytest.raises(UnsupportedInputError, match="found on the grid"):
        nuwa(torch.ones(8), torch.ones(8, 3), None, 3)


def test_nuwa_keeps_everything_as_it_is_at_ratio_0():
    states = noise(48, 5)
    choice = nuwa(noise(48, seed=1).abs(), states, (6, 8), 48)
    assert choice.kept.tolist() == list(range(48))
    assert torch.equal(choice.features, states)


# MustDrop


def squares(states: torch.Tensor, grid: Any, features: torch.Tensor | None = None, **params: Any) -> Any:
    return squeeze.choose(
        "mustdrop",
        at="projector",
        features=states if features is None else features,
        signals={"encoder_states": states},
        grid=grid,
        **params,
    )


def windows_by_loops(states: torch.Tensor, height: int, width: int, threshold: float) -> list[list[int]]:
    """Return the squares of 3 x 3 that are alike, each as its tokens."""
    out = []
    for top in range(0, height, 3):
        for left in range(0, width, 3):
            square = [
                r * width + c for r in range(top, min(top + 3, height)) for c in range(left, min(left + 3, width))
            ]
            pairs = [(a, b) for a in square for b in square if a != b]
            if pairs:
                alike = [float(torch.cosine_similarity(states[a], states[b], dim=0)) for a, b in pairs]
                out += [square] if sum(alike) / len(alike) >= threshold else []
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", [(6, 9), (7, 8)])
def test_mustdrop_merges_squares_that_are_alike(seed, grid):
    height, width = grid
    states = noise(height * width, 4, seed=seed)
    for square in windows_by_loops(states, height, width, -1)[::2]:
        states[square] = noise(1, 4, seed=seed + 7) + 0.2 * states[square]
    features = noise(height * width, 5, seed=seed + 20)
    choice = squares(states, grid, features)
    alike = windows_by_loops(states, height, width, 0.8)
    assert alike
    dropped = {token for square in alike for token in square[1:]}
    assert choice.kept.tolist() == [token for token in range(height * width) if token not in dropped]
    for square in alike:
        mean = features[square].mean(0)
        assert torch.allclose(choice.features[choice.kept.tolist().index(square[0])], mean, atol=1e-5)


@pytest.mark.parametrize("keep", [54, 50, 39, 20, 6, 5, 1])
def test_squares_meet_a_budget_that_is_asked_for(keep):
    """The most alike are left with one token first; the last one of these with what the budget leaves."""
    states = noise(54, 4)
    recipe = load_recipe("mustdrop").to_dict()
    step = {key: value for key, value in recipe["steps"][0].items() if key != "ratio"}
    recipe["steps"] = [step | {"keep": keep}]
    recipe["params"] = {"similarity": 0.8}
    choice = squeeze.choose(recipe, features=states, signals={"encoder_states": states}, grid=(6, 9))
    assert len(choice.kept) == keep


def heard(total: Any, most: Any, marks: Any = None, **params: Any) -> list[int]:
    total, most = torch.as_tensor(total), torch.as_tensor(most)
    marks = torch.zeros_like(total) if marks is None else torch.as_tensor(marks)
    recipe = load_recipe("mustdrop")
    signals = dict(zip(recipe.steps[1].built.needs(), (total, most, marks), strict=True))
    return squeeze.choose("mustdrop", at=str(recipe.steps[1].at), signals=signals, **params).kept.tolist()


def test_mustdrop_by_hand():
    """Sums .06 .003 .0208 .0014 and largest .04 .002 .02 .0009: 1 and 3 go; where 3 is marked it stays."""
    rows = torch.tensor([[0.04, 0.001, 0.02, 0.0005], [0.02, 0.002, 0.0008, 0.0009]])
    given = {"together": 0.05, "alone": 0.01}
    assert heard(rows.sum(0), rows.amax(0), protected=0.0, **given) == [0, 2]
    assert heard(rows.sum(0), rows.amax(0), [0.0, 0, 0, 1], protected=0.25, **given) == [0, 2, 3]
    # One of the two is enough to stay, and one token always does.
    assert heard([0.5, 0.5], [0.9, 0.1], protected=0.0, together=0.6, alone=0.5) == [0]
    assert heard([0.4, 0.6], [0.1, 0.2], protected=0.0, together=0.7, alone=0.5) == [1]


def test_mustdrop_keeps_a_budget_that_is_asked_for():
    total = noise(40).abs()
    kept = heard(total, total, -total, keep=9, protected=0.05, stage=3, before=40)
    marked = (-total).argsort(descending=True)[:2].tolist()
    assert len(kept) == 9
    assert set(marked) <= set(kept)
    assert set(kept) - set(marked) == set(total.argsort(descending=True)[:7].tolist())


# VFlowOpt


def recycle(score: torch.Tensor, features: torch.Tensor, grid: Any, count: int, cell: float) -> Any:
    step = {"at": "projector", "keep": count, "score": "encoder_attention", "merge": {"recycle": cell}}
    recipe = {"method": "recycling", "steps": [step]}
    return squeeze.choose(recipe, features=features, signals={"encoder_attention": score}, grid=grid)


def test_recycling_by_hand():
    """Two of four go, and one more as there is one cell of four: 0 stays alone in its cell, 2 goes into 3."""
    features = torch.tensor([[1.0], [5.0], [2.0], [4.0]])
    choice = recycle(torch.tensor([0.1, 0.4, 0.2, 0.3]), features, (1, 4), 2, 2.0)
    assert choice.kept.tolist() == [0, 1, 3]
    assert choice.features.flatten().tolist() == pytest.approx([1.0, 5.0, (0.2 * 2 + 0.3 * 4) / 0.5])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cell", [2.0, 2.5, 3.7])
def test_recycling_is_its_loops(seed, cell):
    tiles = [Tile(1, 6, 6), Tile(1, 6, 8, row_separators=1)]
    place = [(n, *cell_) for n, tile in enumerate(tiles) for cell_ in tile.coordinates()]
    features = noise(len(place), 4, seed=seed)
    score = noise(len(place), seed=seed + 9).abs()
    score[[n for n, at in enumerate(place) if at[2] < 0]] = -torch.inf
    choice = recycle(score, features, tiles, 30, cell)
    pieces = [n for n, at in enumerate(place) if at[2] >= 0]
    fewer = len(place) - 30 + int(len(place) / cell**2)
    low = sorted(pieces, key=lambda n: (float(score[n]), n))[:fewer]
    cells: dict[Any, list[int]] = {}
    for n in low:
        tile, _, row, column = place[n]
        cells.setdefault((tile, int(row / cell), int(column / cell)), []).append(n)
    kept, states = [n for n in range(len(place)) if n not in low], {}
    for members in cells.values():
        best = max(members, key=lambda n: float(score[n]))
        kept.append(best)
        states[best] = sum(score[n] * features[n] for n in members) / sum(score[n] for n in members)
    assert choice.kept.tolist() == sorted(kept)
    for row, n in zip(choice.features, sorted(kept), strict=True):
        assert torch.allclose(row, states.get(n, features[n]), atol=1e-5)


def test_recycling_keeps_all_where_all_are_asked_for():
    features = noise(36, 3)
    choice = recycle(noise(36).abs(), features, (6, 6), 36, 2.0)
    assert choice.kept.tolist() == list(range(36))
    assert torch.equal(choice.features, features)


def test_recycling_takes_a_batch_as_singles():
    score, features = noise(2, 36).abs(), noise(2, 36, 3, seed=1)
    both = recycle(score, features, (6, 6), 12, 2.5)
    for row in range(2):
        one = recycle(score[row], features[row], (6, 6), 12, 2.5)
        assert both.kept[row].tolist() == one.kept.tolist()
        assert torch.allclose(both.features[row], one.features, atol=1e-6)
