"""Recoverable compression: how many scores stand out, and what is kept, recovered and merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.recipe.recipe import load_recipe
from mllm_squeeze.reducers.needs import Embedding, EncoderProjection


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_outlier_factors_by_hand():
    """Of 0 1 2 3 4 20 only the last stands out."""
    x = torch.tensor([[0.0, 1, 2, 3, 4, 20]])
    factors = ops.local_outlier_factors(x, torch.ones(1, 6, dtype=torch.bool), 2)[0].tolist()
    assert factors == pytest.approx([1.25, 1.25, 0.6667, 1.25, 1.25, 11.0], abs=1e-4)


def factors_by_loops(x: list[float], k: int) -> list[float]:
    k = min(k, len(x) - 1)
    near = [
        sorted((j for j in range(len(x)) if j != i), key=lambda j: (abs(x[i] - x[j]), j))[:k] for i in range(len(x))
    ]
    reach = [abs(x[i] - x[near[i][-1]]) for i in range(len(x))]
    density = [1 / (sum(max(reach[j], abs(x[i] - x[j])) for j in near[i]) / k + 1e-10) for i in range(len(x))]
    return [sum(density[j] for j in near[i]) / k / density[i] for i in range(len(x))]


@pytest.mark.parametrize(("count", "k"), [(30, 5), (12, 20), (2, 3)])
def test_outlier_factors_are_their_loops(count, k):
    x = noise(2, count).double()
    there = torch.ones(2, count, dtype=torch.bool)
    for row in range(2):
        assert ops.local_outlier_factors(x, there, k)[row].tolist() == pytest.approx(
            factors_by_loops(x[row].tolist(), k)
        )
    padded = torch.nn.functional.pad(x, (0, 4))
    there = torch.nn.functional.pad(there, (0, 4))
    assert torch.allclose(
        ops.local_outlier_factors(padded, there, k)[:, :count], ops.local_outlier_factors(x, there[:, :count], k)
    )


def recover(seen: torch.Tensor, said: torch.Tensor, keys: torch.Tensor, features: torch.Tensor, **params: Any) -> Any:
    recipe = load_recipe("recoverable_compression").to_dict()
    recipe["steps"][0] |= {"score": "encoder_attention"} | params.pop("step", {})
    visual = torch.stack([said, (1 - said.square()).clamp(min=0).sqrt()], -1)
    text = torch.tensor([[1.0, 0.0]]).expand(*visual.shape[:-2], 1, 2)
    signals = {"encoder_attention": seen, EncoderProjection("key", -1, "concat"): keys}
    signals |= {Embedding("visual", "clip"): visual, Embedding("text", "clip"): text}
    return squeeze.choose(recipe, features=features, signals=signals, text=text, **params)


def test_what_is_left_is_merged_by_hand():
    """Values 2, 1 and 4 of weights .3 .1 .2: the centre is 2 + .1 + .8, the one token more .1 + .8."""
    features = torch.tensor([[9.0], [1.0], [2.0], [4.0]])
    seen = torch.tensor([0.9, 0.1, 0.3, 0.2])
    step = {"shares": [0.34, 0.0]}
    choice = recover(seen, torch.zeros(4), torch.ones(4, 2), features, keep=3, step=step)
    assert choice.kept.tolist() == [0, 2, 3]
    assert choice.features.flatten().tolist() == pytest.approx([9.0, 2.9, 0.9])


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 11, 39, 40])
def test_a_budget_is_met(keep):
    seen, said = noise(40).abs(), noise(40, seed=1).clamp(-1, 1)
    features = noise(40, 3, seed=2)
    choice = recover(seen, said, noise(40, 5, seed=3), features, keep=keep)
    assert len(choice.kept) == keep
    if keep == 40:
        assert torch.equal(choice.features, features)


@pytest.mark.parametrize("seed", range(4))
def test_counts_follow_from_what_stands_out(seed):
    seen, said = noise(60, seed=seed).exp(), noise(60, seed=seed + 9).tanh()
    keys, features = noise(60, 16, seed=seed + 20), noise(60, 3, seed=seed + 30)
    choice = recover(seen, said, keys, features)

    def share(x: torch.Tensor, k: int) -> float:
        return sum(f > 1.5 for f in factors_by_loops(x.double().tolist(), k)) / len(x)

    first = seen.argsort(descending=True)[: int(60 * share(seen, 20))]
    said = said.clone()
    said[first] = said.min()
    second = said.argsort(descending=True)[: int((60 - len(first)) * share(said, 20))]
    picked = set(first.tolist()) | set(second.tolist())
    rest = [n for n in range(60) if n not in picked]
    centres = sorted(rest, key=lambda n: -float(seen[n]))[: int(16 * share(seen[rest], 10))]
    more = [max((n for n in rest if n not in centres), key=lambda n: float(seen[n]))] if centres else []
    assert choice.kept.tolist() == sorted([*picked, *centres, *more])
    unit = keys / keys.norm(dim=1, keepdim=True)
    for centre in centres:
        others = [n for n in rest if n != centre]
        near = sorted(others, key=lambda n: -float(unit[n] @ unit[centre] + 50 * said[n] / 2**0.5))[:32]
        wanted = features[centre] + sum(seen[n] * features[n] for n in near)
        assert torch.allclose(choice.features[choice.kept.tolist().index(centre)], wanted, atol=1e-4)


def test_a_batch_is_as_singles():
    seen, said = noise(2, 30).exp(), noise(2, 30, seed=1).tanh()
    keys, features = noise(2, 30, 16, seed=2), noise(2, 30, 3, seed=3)
    both = recover(seen, said, keys, features)
    for row in range(2):
        one = recover(seen[row], said[row], keys[row], features[row])
        assert both.kept[row].tolist() == one.kept.tolist()
        assert torch.allclose(both.features[row], one.features, atol=1e-5)
