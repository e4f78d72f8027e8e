"""Frames that are unlike the frames around them, and tokens that are unlike the first frame of their run."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import unit
from .select import positions


@selection
def frames_unlike_window(x: Tensor, window: int, alike: float) -> Tensor:
    """Return bool (T,), the frames whose mean cosine to the frames of their window, itself included, is below `alike`.

    Windows of so many frames do not overlap, and the last may be shorter; the frame in the middle of each, number
    length // 2 from 0, always stays. arXiv 2410.17434. x: (T, D), what describes each frame.
    """
    frames = len(x)
    windows = -(-frames // window)
    rows = x.new_zeros(windows * window, x.shape[1], dtype=torch.float32)
    rows[:frames] = unit(x)
    rows = rows.view(windows, window, -1)
    place = torch.arange(windows * window, device=x.device).view(windows, window)
    length = (place < frames).sum(1, keepdim=True)
    mean = (rows @ rows.transpose(1, 2)).sum(2) / length
    middle = positions(place) == length.div(2, rounding_mode="floor")
    return ((mean < alike) | middle).flatten()[:frames]


@selection
def unlike_first_frame(x: Tensor, run: int, alike: float) -> Tensor:
    """Return bool (T, P), the tokens below this cosine to the one at their place in the first frame of their run.

    Runs are of so many frames, and the last may be shorter; their first frame is all True. x: (T, P, D).
    """
    frame = torch.arange(len(x), device=x.device)
    first = frame - frame % run
    x = unit(x)
    return ((x * x[first]).sum(-1) < alike) | (first == frame)[:, None]


@selection
def without_tails(keep: Tensor, run: int, budget: int) -> Tensor:
    """Return bool (T, P), `keep` with as many tokens cut from the end of each run as brings it down to the budget.

    Each run of so many frames loses the same number, excess / runs rounded up, or all that it has where that is less;
    what is still too much is cut from the end of the whole. keep: bool (T, P). budget: host number, at least 1.
    """
    runs = -(-len(keep) // run)
    flat = keep.flatten().long()
    owner = torch.arange(len(keep), device=keep.device).div(run, rounding_mode="floor")
    owner = owner[:, None].expand(keep.shape).flatten()
    number = flat.new_zeros(runs).scatter_add(0, owner, flat)
    before = number.cumsum(0) - number
    excess = (number.sum() - budget).clamp(min=0)
    left = number - (excess + runs - 1).div(runs, rounding_mode="floor")
    rank = flat.cumsum(0) - 1 - before[owner]
    kept = (flat > 0) & (rank < left[owner])
    return (kept & (kept.long().cumsum(0) <= budget)).view(keep.shape)
