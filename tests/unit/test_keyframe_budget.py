"""KVTP: budgets by the softmax of what frames score, and neighbours that are added, against loops and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.errors import ConfigError
from mllm_squeeze.reducers.needs import Embedding


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kvtp(frames: torch.Tensor, alike: list[float], seen: torch.Tensor, keys: torch.Tensor, **params: Any) -> Any:
    """Run KVTP on frames (T, N, D) whose cosine to the question is a tenth of these numbers."""
    number, places, _ = frames.shape
    cosine = (torch.tensor(alike) / 10).repeat_interleave(places)
    return squeeze.choose(
        "kvtp",
        features=frames.flatten(0, 1),
        signals={
            "encoder_attention": seen.flatten(),
            "encoder_states": keys.flatten(0, 1),
            Embedding("visual", "clip", pooled=True): torch.stack([cosine, (1 - cosine.square()).sqrt()], 1),
            Embedding("text", "clip"): torch.tensor([[1.0, 0.0]]),
        },
        grid=(number, 1, places),
        modality="video",
        **({"temperature": 0.2} | params),
    )


def counts(alike: list[float], places: int, **params: Any) -> list[int]:
    x = noise(len(alike), places, 4)
    kept = kvtp(x, alike, noise(len(alike), places, seed=1).abs(), x, **params).kept
    return torch.bincount(kept // places, minlength=len(alike)).tolist()


def test_budgets_by_hand():
    """Softmax of 0.5 and -0.5, times two frames, times a fifth: 0.2924 and 0.1076 of 100 tokens."""
    assert counts([1, -1], 100, ratio=0.8) == [29, 11]
    assert counts([1, -1], 100, ratio=0.8, variant="official") == [29, 10]


def test_what_a_full_frame_has_no_room_for():
    """Rates 1.896 and three times 0.0347: the code keeps 55 % of the budget; here the surplus goes to the others."""
    assert counts([6, -2, -2, -2], 100, ratio=0.5, variant="official") == [100, 3, 3, 3]
    assert counts([6, -2, -2, -2], 100, ratio=0.5) == [100, 34, 33, 33]


def test_a_frame_may_vanish_but_not_all():
    assert counts([9, 0, -9], 10, keep=3) == [3, 0, 0]
    assert counts([0, 0, 0], 10, keep=2, variant="official") == [1, 0, 0]
    assert counts([0, 0, 0], 10, keep=2) == [1, 1, 0]
    assert counts([9, 0, -9], 10, keep=30, variant="official") == [10, 10, 10]
    assert counts([5], 10, keep=1) == [1]


def shares_by_loop(score: list[float], size: list[int], temperature: float) -> list[float]:
    weights = [n * math.exp(value / temperature) if n else 0.0 for value, n in zip(score, size, strict=True)]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("seed", range(4))
def test_shares_are_their_loop(seed):
    label = torch.randint(-1, 5, (3, 40), generator=torch.Generator().manual_seed(seed))
    label[1][label[1] == 2] = 3  # an empty group
    score = noise(3, 40, seed=seed)
    score[2, 0] = -torch.inf
    size = ops.segment_count(label, 5)
    found = ops.softmax_shares(score, label, size, 0.5)
    for row in range(3):
        means = []
        for group in range(5):
            inside = [float(s) for s, n in zip(score[row], label[row], strict=True) if n == group and s.isfinite()]
            means.append(sum(inside) / max(1, len(inside)))
        wanted = shares_by_loop(means, size[row].long().tolist(), 0.5)
        assert found[row].tolist() == pytest.approx(wanted, rel=1e-4)
    assert ops.softmax_shares(score[:1], label[:1], size[:1], 0.5).tolist() == found[:1].tolist()


@pytest.mark.parametrize("keep", [1, 7, 33, 79, 80])
@pytest.mark.parametrize("seed", range(3))
def test_the_budget_is_kept_to_the_token(keep, seed):
    alike = (3 * noise(5, seed=seed)).tolist()
    found = counts(alike, 16, keep=keep)
    assert sum(found) == keep
    assert max(found) <= 16
    down = counts(alike, 16, keep=keep, variant="official")
    wanted = [min(16, math.floor(keep * share + 1e-6)) for share in shares_by_loop(alike, [16] * 5, 2.0)]
    if keep == 80:
        wanted = [16] * 5
    assert down == wanted or sum(wanted) == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("most", [2, 32])
def test_it_is_its_loops(seed, variant, most):
    frames, keys = noise(4, 12, 6, seed=seed), noise(4, 12, 5, seed=seed + 10)
    seen = noise(4, 12, seed=seed + 20).abs()
    alike = noise(4, seed=seed + 30).tolist()
    choice = kvtp(frames, alike, seen, keys, variant=variant, keep=15, neighbours=most)
    sizes = torch.bincount(choice.kept // 12, minlength=4).tolist()
    rows = {}
    for t, size in enumerate(sizes):
        for n in sorted(range(12), key=lambda n: (-float(seen[t, n]), n))[:size]:
            near = {m: float(torch.cosine_similarity(keys[t, n], keys[t, m], dim=0)) for m in range(12) if m != n}
            row = frames[t, n].clone()
            for m in sorted(near, key=lambda m: (-near[m], m))[:most] if size < 12 else []:
                row += seen[t, m] * frames[t, m]
            rows[t * 12 + n] = row
    assert choice.kept.tolist() == sorted(rows)
    assert torch.allclose(choice.features, torch.stack([rows[n] for n in sorted(rows)]), atol=1e-5)


def test_neighbours_by_hand():
    """Of the first token's neighbours the one that is most alike is added, a survivor too; the rest is dropped."""
    frames = torch.tensor([[[1.0, 0.0], [10.0, 0.0], [100.0, 0.0], [0.0, 5.0]]])
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [1.0, 1.0], [0.0, 1.0]]])
    seen = torch.tensor([[0.9, 0.8, 0.2, 0.1]])
    choice = kvtp(frames, [0.0], seen, keys, keep=2, neighbours=1)
    assert choice.kept.tolist() == [0, 1]
    assert choice.features.flatten().tolist() == pytest.approx([9.0, 0.0, 10.9, 0.0])


def test_a_whole_frame_stays_as_it_is():
    frames = noise(3, 6, 4)
    choice = kvtp(frames, [9.0, 0.0, 0.0], torch.ones(3, 6), frames, keep=8)
    assert choice.kept.tolist() == [0, 1, 2, 3, 4, 5, 6, 12]
    assert torch.equal(choice.features[:6], frames[0])
    assert not torch.allclose(choice.features[6], frames[1, 0])


def test_what_goes_nowhere_goes_nowhere():
    """The first token is near none of those that stay; in a batch too, where fewer stay than in others."""
    x = torch.stack([noise(6, 3), noise(6, 3, seed=1)])
    label = torch.zeros(2, 6, dtype=torch.int64)
    centres = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    weight = torch.ones(2, 6)
    entries = ops.neighbour_entries(x, weight, centres, label, 1, 3)
    target = ops.strongest_target(centres, *entries)
    for row in range(2):
        alike = torch.nn.functional.normalize(x[row], dim=1)
        alike = (alike @ alike.T).fill_diagonal_(-2)
        taken = {int(alike[n].argmax()) for n in centres[row].nonzero().flatten().tolist()}
        for n in range(6):
            assert (int(target[row, n]) >= 0) == (bool(centres[row, n]) or n in taken)


def test_a_batch_is_its_singles():
    x, seen, cosine = noise(2, 24, 6), noise(2, 24, seed=1).abs(), noise(2, 4, seed=2).tanh().repeat_interleave(6, 1)
    signals = {
        "encoder_attention": seen,
        "encoder_states": x,
        Embedding("visual", "clip", pooled=True): torch.stack([cosine, (1 - cosine.square()).sqrt()], 2),
        Embedding("text", "clip"): torch.tensor([[[1.0, 0.0]]]).expand(2, -1, -1),
    }
    given: dict[str, Any] = {"grid": (4, 1, 6), "modality": "video", "keep": 9, "temperature": 0.3}
    both = squeeze.choose("kvtp", features=x, signals=signals, **given)
    for row in range(2):
        one = squeeze.choose("kvtp", features=x[row], signals={k: v[row] for k, v in signals.items()}, **given)
        assert both.kept[row].tolist() == one.kept.tolist()
        assert torch.allclose(both.features[row], one.features, atol=1e-6)


def test_whole_pictures_are_compared_in_clip_only():
    for wrong in ({"space": "llm"}, {"space": "clip", "fallback": True}, {}):
        step = {"at": "projector", "keep": 5, "score": {"text_similarity": {"of": "pictures"} | wrong}}
        with pytest.raises(ConfigError, match="of: pictures takes space: clip"):
            squeeze.choose({"method": "whole", "steps": [step]}, features=noise(9, 4))
