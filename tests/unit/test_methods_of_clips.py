"""Methods for videos in front of the language model: worked examples by hand, and literal slow versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
from mllm_squeeze.errors import UnsupportedInputError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clip(method: str, frames: torch.Tensor, grid: Any = None, **params: Any) -> Any:
    """Run a method on frames (T, N, D) of a grid, by default one row per frame."""
    shape = grid or (len(frames), 1, frames.shape[1])
    return squeeze.choose(method, features=frames.flatten(0, 1), grid=shape, modality="video", **params)


# EVS


def test_evs_by_hand():
    """Changes .3 .1 and .3 .05: of three tokens two are the first frame, and of equal ones the earlier stays."""
    angles = torch.tensor([[0.0, 0.0], [0.7954, 0.4510], [1.5908, 0.7686]])
    frames = torch.stack([angles.cos(), angles.sin()], -1)
    assert clip("evs", frames, keep=3).kept.tolist() == [0, 1, 2]
    assert clip("evs", frames, keep=4).kept.tolist() == [0, 1, 2, 4]
    assert clip("evs", frames, keep=5).kept.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(3))
def test_evs_is_its_loop(seed):
    frames = noise(5, 12, 6, seed=seed)
    changes = [255.0] * 12
    for t in range(1, 5):
        changes += [1 - float(torch.cosine_similarity(frames[t, n], frames[t - 1, n], dim=0)) for n in range(12)]
    best = sorted(sorted(range(60), key=lambda i: -round(changes[i], 5))[:23])
    assert clip("evs", frames, (5, 3, 4), keep=23).kept.tolist() == best


@pytest.mark.parametrize(
    "frames", [torch.ones(4, 6, 3), torch.zeros(4, 6, 3), torch.ones(1, 6, 3), torch.ones(2, 6, 3)]
)
def test_evs_keeps_its_budget_where_nothing_moves(frames):
    count = frames.shape[0] * frames.shape[1]
    for keep in (1, 5, count):
        kept = clip("evs", frames, keep=keep).kept
        assert len(kept) == keep
        assert kept.tolist()[: min(6, keep)] == list(range(min(6, keep)))


def test_evs_takes_a_batch_as_singles():
    frames = noise(2, 20, 6)
    both = squeeze.choose("evs", features=frames, grid=(5, 2, 2), modality="video", keep=9).kept
    for row in range(2):
        assert both[row].tolist() == clip("evs", frames[row].view(5, 4, 6), (5, 2, 2), keep=9).kept.tolist()


def test_evs_needs_frames():
    with pytest.raises(UnsupportedInputError, match="frames of one size"):
        squeeze.choose("evs", features=noise(20, 4), modality="video", keep=9)
