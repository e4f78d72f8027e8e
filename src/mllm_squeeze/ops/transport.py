"""Optimal transport between the tokens of a piece as they are and as a layer sees them, cut off after a few rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32, selection


@selection
def transported_mass(log_kernel: Tensor, first: Tensor, second: Tensor, mask: Tensor, rounds: int) -> Tensor:
    """Return float32 (R, M), the sums over columns of the plan diag(u) K diag(v) after a few rounds of Sinkhorn.

    A round sets u = first / (K v) and then v = second / (K^T u), beginning with v = 1. As it ends on the columns, the
    rows have not come to `first` yet, and their sums say something; with the row last, or many rounds, they would be
    `first`. log_kernel: (R, M, M), the logarithm of K. first, second: (R, M), above 0 where mask is True, of equal sum.
    mask: bool (R, M), False takes no part.
    """
    log_kernel = at_least_float32(log_kernel).masked_fill(~(mask[:, :, None] & mask[:, None]), -torch.inf)
    goals = [at_least_float32(goal).masked_fill(~mask, 1).log() for goal in (first, second)]
    u = v = torch.zeros_like(goals[0])
    for _ in range(rounds):
        u = (goals[0] - (log_kernel + v[:, None]).logsumexp(2)).masked_fill(~mask, -torch.inf)
        v = (goals[1] - (log_kernel + u[:, :, None]).logsumexp(1)).masked_fill(~mask, -torch.inf)
    return (u + (log_kernel + v[:, None]).logsumexp(2)).exp().masked_fill(~mask, 0)


@selection
def transport_cost(
    x: Tensor, y: Tensor, place: Tensor, mask: Tensor, weights: tuple[float, float, float], sigma: float
) -> Tensor:
    """Return float32 (R, M, M), what it costs to bring token i of x to token j of y.

    A weighted sum of three costs, each scaled to 0 and 1 over the piece: the distance between x_i and y_j, the distance
    d between both on the grid as 1 - exp(-d ** 2 / (2 * sigma ** 2)), and the distance of i from the middle of what is
    there. x, y: (R, M, D). place: (R, M, 2), rows and columns. mask: bool (R, M).
    """
    x, y = (at_least_float32(one).masked_fill(~mask[..., None], 0) for one in (x, y))
    place = place.to(x.dtype).masked_fill(~mask[..., None], 0)
    exactly = "donot_use_mm_for_euclid_dist"
    apart = torch.cdist(place, place, compute_mode=exactly)
    far = 1 - torch.exp(-(apart**2) / (2 * sigma**2))
    least = place.masked_fill(~mask[..., None], torch.inf).amin(1, keepdim=True)
    middle = (least + place.amax(1, keepdim=True)) / 2
    outside = torch.linalg.vector_norm(place - middle, dim=2)
    pairs = mask[:, :, None] & mask[:, None]
    costs = (torch.cdist(x, y), far, outside[..., None].expand_as(far))
    return sum((w * _scaled(cost, pairs) for w, cost in zip(weights, costs, strict=True)), torch.zeros_like(far))


def _scaled(cost: Tensor, there: Tensor) -> Tensor:
    """Return a cost (R, M, M) scaled to 0 and 1 over what is there, 0 where all of it is the same."""
    low = cost.masked_fill(~there, torch.inf).amin((1, 2), keepdim=True)
    high = cost.masked_fill(~there, -torch.inf).amax((1, 2), keepdim=True)
    reach = high - low
    # Of an empty piece all is infinite.
    return torch.where((reach > 0) & there, (cost - low) / reach.where(reach > 0, 1), 0)
