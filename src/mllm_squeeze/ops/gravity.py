"""What rotary positions alone make a row prefer, and attention that is freed of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32, selection
from .select import top_k_mask

_FLOOR = 1e-6


@selection
def rotary_gravity(rows: Tensor, columns: Tensor) -> Tensor:
    """Return float32 (S, R, N), the logit of a query and a key that are all ones, turned to where they stand.

    With half of d angles that grow with the distance it is 2 * sum(cos(distance * frequency)) / sqrt(d).

    rows: (S, R, 2 * d), the cosines and then the sines of the angles of d channels. columns: (S, N, 2 * d).
    """
    products = at_least_float32(rows) @ at_least_float32(columns).transpose(1, 2)
    return products / (rows.shape[-1] / 2) ** 0.5


@selection
def priority_heads(received: Tensor, mask: Tensor, count: int) -> Tensor:
    """Return bool (S, H), the heads that give most to the tokens; ties take the first.

    received: float32 (S, H, R, N), what each row of each head gives each token. mask: bool (S, N). count: how many
    heads; all where there are fewer.
    """
    mass = received.masked_fill(~mask[:, None, None], 0).sum((2, 3))
    return top_k_mask(mass, torch.ones_like(mass, dtype=torch.bool), min(count, mass.shape[1]))


@selection
def freed_attention(received: Tensor, mask: Tensor, gravity: Tensor | None, heads: int | None) -> Tensor:
    """Return float32 (S, N), attention divided by the gravity of each row, as the mean over heads and then over rows.

    received: float32 (S, H, R, N), 0 in rows that do not count. mask: bool (S, N). gravity: (S, R, N), None divides by
    nothing; nearer to zero than a millionth it counts as that, with its sign. heads: how many `priority_heads` of the
    divided attention are averaged, None for all.
    """
    received = received.masked_fill(~mask[:, None, None], 0)
    looks = (received != 0).any(3).any(1)
    there = looks.sum(1, keepdim=True).clamp(min=1)
    if gravity is not None:
        gravity = torch.where(looks[..., None], gravity, 1)
        floor = torch.where(gravity < 0, -_FLOOR, _FLOOR)
        received = received / torch.where(gravity.abs() < _FLOOR, floor, gravity)[:, None]
    summed = received.sum(2)
    if heads is None:
        return summed.mean(1) / there
    chosen = priority_heads(received, mask, heads)[..., None]
    return summed.masked_fill(~chosen, 0).sum(1) / chosen.sum(1) / there
