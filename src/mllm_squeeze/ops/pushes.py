"""How far what is made of tokens moves where they are pushed a little."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .precision import at_least_float32, selection
from .score import unit

# Numbers of pushed tokens that are held at once: 2 ** 24 float32 are 64 MiB.
_MOST = 1 << 24


@selection
def push_response(
    x: Tensor, project: Callable[[Tensor], Tensor], directions: Tensor, step: float, most: int = _MOST
) -> Tensor:
    """Return float32 (A, N) or (N,), the mean over directions u of |f(x + step * u) - f(x - step * u)| / (2 * step).

    x: (A, M, C), or (M, C). project: f, from such to (A, N, D) or (N, D); what stands behind in the first axis does not
    matter to what stands in front. directions: (m, C), of any length but zero; they are scaled to length 1. most:
    numbers that f is given at once.
    """
    x, directions = at_least_float32(x), unit(directions)
    at_once = max(1, most // max(1, 2 * x.numel()))
    total: Tensor | None = None
    for some in directions.split(at_once):
        push = step * some.view(len(some), *(1,) * (x.ndim - 1), -1)
        there, back = project(torch.cat([(x + push).flatten(0, 1), (x - push).flatten(0, 1)])).chunk(2)
        moved = (at_least_float32(there) - at_least_float32(back)).norm(dim=-1)
        found = moved.unflatten(0, (len(some), -1)).sum(0)
        total = found if total is None else total + found
    assert total is not None
    return total / (2 * step * len(directions))
