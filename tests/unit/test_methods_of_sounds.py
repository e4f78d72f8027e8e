"""Methods for sounds: worked examples by hand, and literal slow versions on random inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.recipe.recipe import load_recipe


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps_of(cosines: list[float]) -> torch.Tensor:
    """Return vectors on a circle whose neighbours have these cosines."""
    angle = torch.tensor([0.0, *cosines]).clamp(-1, 1)
    turn = torch.cat([torch.zeros(1), angle[1:].arccos()]).cumsum(0)
    return torch.stack([turn.cos(), turn.sin()], 1)


def sound(method: str, features: torch.Tensor, by: torch.Tensor, **params: Any) -> Any:
    """Run a method whose tokens are compared by vectors of their own, whatever the recipe compares."""
    recipe = load_recipe(method).to_dict()
    step = recipe["steps"][0]
    part, given = next(iter(step["merge"].items())) if isinstance(step["merge"], dict) else (step["merge"], {})
    step["merge"] = {part: {**given, "by": "keys"}}
    step["at"] = {"layer": 1}
    recipe["params"].pop("layer", None)
    signals = {"projection": by, **params.pop("signals", {})}
    return squeeze.choose(recipe, features=features, signals=signals, modality="audio", **params)


VALUES = torch.tensor([[0.0], [3.0], [6.0], [9.0], [12.0]])
ALIKE = [0.9, 0.95, 0.2, 0.8]


def test_a_tome_by_hand():
    """Two sites in a row are one merge; with a third one there are two."""
    choice = sound("a_tome", VALUES, steps_of(ALIKE), keep=3)
    assert choice.kept.tolist() == [0, 2, 3, 4]
    assert choice.features.flatten().tolist() == [1.5, 6.0, 9.0, 12.0]
    choice = sound("a_tome", VALUES, steps_of(ALIKE), keep=2)
    assert choice.features.flatten().tolist() == [1.5, 6.0, 10.5]


@pytest.mark.parametrize(
    ("weights", "merged"), [([1.0, 2, 1, 1, 1], 3.0), ([1.0, 1, 2, 1, 1], 3.75), ([0.0, 0, 0, 1, 1], 3.0)]
)
def test_fastadasp_by_hand(weights, merged):
    """The run of the first three is their mean, weighted by the attention that they receive."""
    signals = {"attention": torch.tensor(weights)}
    choice = sound("fastadasp", VALUES, steps_of(ALIKE), keep=3, signals=signals)
    assert choice.kept.tolist() == [0, 3, 4]
    if sum(weights[:3]):
        assert choice.features.flatten().tolist() == pytest.approx([merged, 9.0, 12.0])
    assert torch.isfinite(choice.features).all()


def walk(features: torch.Tensor, keys: torch.Tensor, fewer: int, pairs: bool, weights: torch.Tensor) -> torch.Tensor:
    """Walk over the sound from its start, as the specs word it."""
    alike = torch.cosine_similarity(keys[:-1], keys[1:], dim=1)
    sites = set(alike.argsort(descending=True, stable=True)[:fewer].tolist())
    out, i = [], 0
    while i < len(features):
        j = i
        while j in sites and (not pairs or j == i):
            j += 1
        share = torch.ones(j - i + 1) if pairs else weights[i : j + 1]
        out.append((features[i : j + 1] * share[:, None]).sum(0) / share.sum())
        i = j + 1
    return torch.stack(out)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fewer", [0, 1, 11, 25, 39])
def test_both_are_their_walks(seed, fewer):
    features, keys, weights = noise(40, 5, seed=seed), noise(40, 6, seed=seed + 9), noise(40, seed=seed + 20).exp()
    choice = sound("a_tome", features, keys, keep=40 - fewer)
    assert torch.allclose(choice.features, walk(features, keys, fewer, True, weights), atol=1e-5)
    choice = sound("fastadasp", features, keys, keep=40 - fewer, signals={"attention": weights})
    assert torch.allclose(choice.features, walk(features, keys, fewer, False, weights), atol=1e-5)
    assert len(choice.kept) == 40 - fewer


def test_sounds_do_not_merge_across_groups_and_batches_are_as_singles():
    x = torch.ones(1, 6, 3)
    label = torch.tensor([[0, 0, 0, 1, 1, -1]])
    assert ops.adjacent_sites(x, label, torch.tensor([9])).tolist() == [[True, True, False, True, False, False]]
    features, keys = noise(2, 30, 4), noise(2, 30, 5, seed=1)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 22:] = False
    weights = noise(2, 30, seed=2).exp()
    both = sound("fastadasp", features, keys, keep=8, mask=mask, signals={"attention": weights})
    for row, width in ((0, 30), (1, 22)):
        signals = {"attention": weights[row, :width]}
        one = sound("fastadasp", features[row, :width], keys[row, :width], keep=8, signals=signals)
        assert both.kept[row].tolist() == one.kept.tolist()
        assert torch.allclose(both.features[row], one.features, atol=1e-5)


@pytest.mark.parametrize("method", ["a_tome", "fastadasp"])
def test_silence_is_merged_from_its_start(method):
    still = torch.ones(10, 3)
    signals = {"attention": torch.ones(10)} if method == "fastadasp" else {}
    choice = sound(method, torch.arange(10.0)[:, None], still, keep=6, signals=signals)
    assert choice.kept.tolist() == ([0, 5, 6, 7, 8, 9] if method == "fastadasp" else [0, 2, 4, 5, 6, 7, 8, 9])
