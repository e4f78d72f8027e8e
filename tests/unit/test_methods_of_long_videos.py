"""Methods that fit a long video into a budget: worked examples by hand, and literal slow versions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import mllm_squeeze as squeeze
from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(frames: torch.Tensor) -> torch.Tensor:
    """Return what describes frames (T, N, D) so that no two are alike."""
    return torch.eye(len(frames))[:, None].expand(-1, frames.shape[1], -1)


def longvu(frames: torch.Tensor, grid: Any, seen: Any = None, text: Any = None, **params: Any) -> Any:
    """Run the method on frames (T, N, D) that seen (T, N, E) describes."""
    return squeeze.choose(
        "longvu",
        features=frames.flatten(0, 1),
        signals={"encoder_states": (apart(frames) if seen is None else seen).flatten(0, 1)},
        text=noise(3, frames.shape[2], seed=9) if text is None else text,
        grid=grid,
        modality="video",
        **params,
    )


# Frames that are alike


def vectors_of(gram: list[list[float]]) -> torch.Tensor:
    return torch.linalg.cholesky(torch.tensor(gram))


def test_frames_of_a_window_by_hand():
    """Means .95, .957, .94 leave but the middle frame; .7, .733, .5 leave all; a window of one frame stays."""
    near = vectors_of([[1, 0.95, 0.9], [0.95, 1, 0.92], [0.9, 0.92, 1]])
    far = vectors_of([[1, 0.9, 0.2], [0.9, 1, 0.3], [0.2, 0.3, 1]])
    assert ops.frames_unlike_window(near, 16, 0.83).tolist() == [False, True, False]
    assert ops.frames_unlike_window(far, 16, 0.83).tolist() == [True, True, True]
    both = ops.frames_unlike_window(torch.cat([near, far, near[:1]]), 3, 0.83)
    assert both.tolist() == [False, True, False, True, True, True, True]
    assert ops.frames_unlike_window(torch.zeros(5, 3), 4, 0.83).all()


def frames_by_loops(x: torch.Tensor, window: int, alike: float) -> list[int]:
    kept = []
    for start in range(0, len(x), window):
        rows = x[start : start + window]
        for t in range(len(rows)):
            mean = sum(float(torch.cosine_similarity(rows[t], row, dim=0)) for row in rows) / len(rows)
            if t == len(rows) // 2 or mean < alike:
                kept.append(start + t)
    return kept


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [1, 4, 7, 30])
def test_frames_of_a_window_are_their_loop(seed, window):
    x = noise(1, 8, seed=seed) + noise(22, 8, seed=seed + 10)
    kept = ops.frames_unlike_window(x, window, 0.5).nonzero().flatten().tolist()
    assert kept == frames_by_loops(x, window, 0.5)


# What stands still


def test_what_stands_still_by_hand():
    """Cosines .9, .5 and .8 to the first frame: only the one of .5 stays where .8 is still."""
    x = torch.stack([torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.9, 0.19**0.5], [0.5, 0.75**0.5], [0.8, 0.6]])])
    assert ops.unlike_first_frame(x, 8, 0.8).tolist() == [[True] * 3, [False, True, False]]
    assert ops.unlike_first_frame(x, 1, 0.8).all()


def test_tails_by_hand():
    """Seven in two runs are one too many for six, so each run loses its last; three in one run end at two."""
    keep = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 1]]).bool()
    assert ops.without_tails(keep, 2, 6).tolist() == [[True, True], [False, False], [True, True], [True, False]]
    assert ops.without_tails(keep, 2, 7).equal(keep)
    # Four too many are two each; the run of one has but that, and what is left is cut at three.
    few = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()
    assert ops.without_tails(few, 1, 3).int().tolist() == [[1, 1, 1, 0, 0, 0], [0] * 6]


def fitted_by_loops(x: torch.Tensor, run: int, still: float, budget: int) -> list[int]:
    pieces = []
    for start in range(0, len(x), run):
        piece = []
        for t in range(start, min(start + run, len(x))):
            for n in range(x.shape[1]):
                alike = float(torch.cosine_similarity(x[start, n], x[t, n], dim=0))
                if t == start or alike < still:
                    piece.append(t * x.shape[1] + n)
        pieces.append(piece)
    excess = sum(map(len, pieces)) - budget
    if excess > 0:
        fewer = math.ceil(excess / len(pieces))
        pieces = [piece[: max(0, len(piece) - fewer)] for piece in pieces]
    return [n for piece in pieces for n in piece][:budget]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [1, 7, 30, 45, 70])
def test_a_video_too_long_is_its_loops(seed, budget):
    x = noise(1, 6, 5, seed=seed) + 0.7 * noise(13, 6, 5, seed=seed + 10)
    choice = longvu(x, (13, 2, 3), keep=budget, small=1.0, run=4, still=0.6)
    assert choice.kept.tolist() == fitted_by_loops(x, 4, 0.6, budget)
    assert torch.equal(choice.features, x.flatten(0, 1)[choice.kept])


# The whole


def averages(frame: torch.Tensor, height: int, width: int, high: int, wide: int) -> dict[int, torch.Tensor]:
    """Return the mean of each window of a frame (N, D), at its first place."""
    windows: dict[tuple[int, int], list[int]] = {}
    for h in range(height):
        for w in range(width):
            windows.setdefault((h * high // height, w * wide // width), []).append(h * width + w)
    return {places[0]: frame[places].mean(0) for places in windows.values()}


def test_longvu_by_hand():
    """10 frames of 144 or 64 tokens: room for 1000 makes floor((1000 - 640) / 80) = 4 whole, those near the words."""
    frames = noise(10, 144, 6)
    text = noise(3, 6, seed=3)
    choice = longvu(frames, (10, 12, 12), text=text, keep=1000)
    number = torch.bincount(choice.kept // 144, minlength=10)
    near = [float(torch.stack([*averages(frame, 12, 12, 8, 8).values()]).mean(0) @ text.mean(0)) for frame in frames]
    assert sorted(number.tolist()) == [64] * 6 + [144] * 4
    assert (number == 144).nonzero().flatten().tolist() == sorted(sorted(range(10), key=lambda t: -near[t])[:4])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [1, 20, 56, 70, 100, 135])
def test_longvu_is_its_loops(seed, keep):
    """9 frames of 5 x 3, of which some are alike; small ones have 3 x 2 tokens or fewer."""
    frames = noise(9, 15, 6, seed=seed)
    seen = noise(1, 15, 4, seed=seed + 1) + 0.8 * noise(9, 15, 4, seed=seed + 2)
    text = noise(4, 6, seed=seed + 3)
    choice = longvu(frames, (9, 5, 3), seen, text, keep=keep, window=4, alike=0.7, run=3, still=0.2)
    left = list(range(9)) if keep >= 135 else frames_by_loops(seen.flatten(1), 4, 0.7)
    low = [averages(frame, 5, 3, 3, 2) for frame in frames]
    number = len(low[0])
    assert number == 6
    rows: dict[int, torch.Tensor] = {}
    if len(left) * number <= keep:
        room = (keep - len(left) * number) // (15 - number)
        near = {t: float(torch.stack([*low[t].values()]).mean(0) @ text.mean(0)) for t in left}
        whole = sorted(left, key=lambda t: -near[t])[:room]
        for t in left:
            rows |= {t * 15 + n: x for n, x in (enumerate(frames[t]) if t in whole else low[t].items())}
    else:
        order = [(t, n) for t in left for n in low[t]]
        small = torch.stack([torch.stack([*low[t].values()]) for t in left])
        for place in fitted_by_loops(small, 3, 0.2, keep):
            t, n = order[place]
            rows[t * 15 + n] = low[t][n]
    assert choice.kept.tolist() == sorted(rows)
    assert torch.allclose(choice.features, torch.stack([rows[n] for n in sorted(rows)]), atol=1e-5)
    assert len(rows) <= keep


@pytest.mark.parametrize("frames", [torch.ones(4, 6, 3), torch.zeros(4, 6, 3), torch.ones(1, 6, 3), noise(2, 1, 3)])
def test_longvu_of_any_video(frames):
    count, grid = frames.shape[0] * frames.shape[1], (len(frames), 1, frames.shape[1])
    for keep in (1, count // 2, count - 1):
        choice = longvu(frames, grid, frames, keep=max(1, keep))
        assert 1 <= len(choice.kept) <= max(1, keep)
        assert torch.isfinite(choice.features).all()
    assert torch.equal(longvu(frames, grid, frames, ratio=0.0).features, frames.flatten(0, 1))


def test_of_equal_frames_the_first_is_whole():
    """All frames are as near to the words: there is room for one of 16 beside three of 4, and the first one has it."""
    choice = longvu(torch.ones(4, 16, 3), (4, 4, 4), keep=30, small=0.25)
    assert torch.bincount(choice.kept // 16).tolist() == [16, 4, 4, 4]


def test_longvu_takes_a_batch_as_singles():
    frames, seen, text = noise(2, 8, 12, 6), noise(2, 8, 12, 4, seed=1), noise(2, 3, 6, seed=2)
    for keep in (20, 40, 70):
        both = squeeze.choose(
            "longvu",
            features=frames.flatten(1, 2),
            signals={"encoder_states": seen.flatten(1, 2)},
            text=text,
            grid=(8, 3, 4),
            modality="video",
            keep=keep,
        )
        for row in range(2):
            one = longvu(frames[row], (8, 3, 4), seen[row], text[row], keep=keep)
            assert both.kept[row].tolist() == one.kept.tolist()
            assert torch.allclose(both.features[row], one.features, atol=1e-5)


def test_longvu_takes_whole_frames_only():
    """Frames that are hidden whole are no part of the video; one with a hole is refused."""
    frames, mask = noise(2, 36, 6), torch.ones(2, 36, dtype=torch.bool)
    mask[0, 20] = False
    mask[1, 27:] = False

    def run(rows: slice) -> Any:
        states = frames[rows]
        given = {"features": states, "signals": {"encoder_states": states}, "text": noise(2, 3, 6)[rows]}
        return squeeze.choose("longvu", mask=mask[rows], grid=(4, 3, 3), modality="video", keep=15, **given)

    with pytest.raises(UnsupportedInputError, match="1 of 36 places"):
        run(slice(2))
    alone = longvu(frames[1, :27].view(3, 9, 6), (3, 3, 3), frames[1, :27].view(3, 9, 6), noise(2, 3, 6)[1], keep=15)
    assert run(slice(1, 2)).kept[0].tolist() == alone.kept.tolist()
