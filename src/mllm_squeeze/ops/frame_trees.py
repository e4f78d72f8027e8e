"""Trees that grow over the frames of a video: a token hangs on the one of the frame before that it is like."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import cosine


@selection
def hung_on_frame_before(x: Tensor, free: Tensor, above: float, least: int) -> Tensor:
    """Return int64 (F, P), the place in the frame before on which a token hangs, -1 where it hangs on none.

    It hangs on the one that it is most like, the first on ties, where their cosine is above a number. Where fewer than
    `least` tokens would stay that hang on none, the number is the smallest cosine that would hang one too many. x:
    (F, P, D). free: bool (F, P), others hang on nothing, and nothing on them.
    """
    frames, places = free.shape
    alike = cosine(x[1:], x[:-1])
    alike = alike.masked_fill(~(free[1:, :, None] & free[:-1, None]), -1)
    best, place = alike.max(2)
    best = torch.nn.functional.pad(best, (0, 0, 1, 0), value=-1)
    place = torch.nn.functional.pad(place, (0, 0, 1, 0), value=-1)
    more = frames * places - least
    if more < 1:
        return torch.full_like(place, -1)
    # Above the smallest of the best `more` hang fewer than these.
    last = best.flatten().topk(more).values[-1]
    bar = torch.where((best > above).sum() > more, last, last.new_tensor(above))
    return place.masked_fill(best <= bar, -1)


def tree_weights(place: Tensor, true_mean: bool) -> tuple[Tensor, Tensor]:
    """Return (int64 (F, P), float32 (F, P)): the root of each token's tree, f * P + p, and its weight there.

    place: int64 (F, P), as `hung_on_frame_before` gives it. true_mean: a tree becomes the mean of its tokens; else
    their sum over one more than how many hang on the root itself, so that longer chains are longer vectors.
    """
    frames, places = place.shape
    root = torch.arange(frames * places, device=place.device).view(frames, places)
    own = root
    rows = [root[0]]
    for frame in range(1, frames):
        rows.append(torch.where(place[frame] >= 0, rows[-1][place[frame].clamp(min=0)], root[frame]))
    root = torch.stack(rows)
    before = own - places - own % places + place.clamp(min=0)
    target = root if true_mean else before.where(place >= 0, own)
    counted = (place >= 0) | true_mean
    total = torch.zeros(frames * places, device=place.device)
    total = total.scatter_add(0, target.flatten().clamp(min=0), counted.flatten().float())
    return root, 1 / (total[root] if true_mean else total[root] + 1)
