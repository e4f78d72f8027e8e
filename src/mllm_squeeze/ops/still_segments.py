"""Runs of frames in which most stands still, and what stands still there as a few clusters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .merge import density_peaks
from .precision import selection

Entries = tuple[Tensor, Tensor, Tensor, Tensor]


@selection
def still_counts(calm: Tensor) -> Tensor:
    """Return int64 (T, T), at [u, v] how many places stand still from frame u to frame v; 0 where v <= u.

    calm: bool (T - 1, P), where a place is as it was one frame before.
    """
    frames = len(calm) + 1
    counts = torch.zeros(frames, frames, dtype=torch.int64, device=calm.device)
    for start in range(frames - 1):
        counts[start, start + 1 :] = calm[start:].long().cumprod(0).sum(1)
    return counts


def most_still(counts: Sequence[Sequence[int]], longest: int) -> tuple[list[tuple[int, int]], int]:
    """Return the runs of frames (first, last) that save most, and how many tokens they save.

    A run saves the places that stand still in it, in all its frames but one. Of equal ones the last frame by itself
    wins, then the shorter run. arXiv 2505.21334. counts: as `still_counts` gives them. longest: of a run, in frames.
    """
    frames = len(counts)
    best, width = [0] * (frames + 1), [1] * (frames + 1)
    for end in range(1, frames + 1):
        best[end] = best[end - 1]
        for size in range(2, min(end, longest) + 1):
            saved = best[end - size] + counts[end - size][end - 1] * (size - 1)
            if saved > best[end]:
                best[end], width[end] = saved, size
    runs, end = [], frames
    while end:
        runs.append((end - width[end], end - 1))
        end -= width[end]
    return runs[::-1], best[frames]


@selection
def cluster_weights(x: Tensor, mask: Tensor, clusters: Tensor, neighbours: int, own: float) -> tuple[Tensor, Tensor]:
    """Return (int64 (R, P), float32 (R, P)): whom each token goes into, and with what weight; -1 and 0 for none.

    Centres are those of density-peak clusters, at most so many neighbours looked at as there are clusters; a centre
    counts `own` and its other tokens share the rest evenly, or 1 where it has none. x: (R, P, D). mask: bool (R, P).
    clusters: int64 (R,), 0 drops all.
    """
    looked_at = clusters.clamp(max=neighbours)
    into = density_peaks(x, mask, clusters, looked_at)
    into = into.masked_fill((clusters < 1)[:, None] | ~mask, -1)
    place = torch.arange(x.shape[1], device=x.device)
    centre, other = into == place, (into >= 0) & (into != place)
    members = torch.zeros(len(x), x.shape[1], device=x.device)
    members = members.scatter_add(1, into.clamp(min=0), other.float())
    many = members.gather(1, into.clamp(min=0))
    weight = torch.where(centre, torch.where(many > 0, own, 1.0), (1 - own) / many.clamp(min=1))
    return into, weight.masked_fill(into < 0, 0)
