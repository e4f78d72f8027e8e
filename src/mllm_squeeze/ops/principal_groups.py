"""Tokens in groups by the principal part that they belong to, one of each like kind in a group first."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import cosine, unit
from .select import rank_within


@selection
def principal_parts(x: Tensor, mask: Tensor, slots: int) -> Tensor:
    """Return float64 (S, N, slots), how much each token has of the first principal parts of its span, by absolute size.

    The parts are the eigenvectors of largest eigenvalue of Z Z^T, Z the sigmoid of x minus its mean over channels.
    arXiv 2603.09480. x: (S, N, D). mask: bool (S, N). On a GPU the decomposition waits for the device.
    """
    z = x.double().sigmoid()
    z = (z - z.mean(2, keepdim=True)).masked_fill(~mask[..., None], 0)
    vectors = torch.linalg.eigh(z @ z.transpose(1, 2)).eigenvectors
    found = vectors.flip(2)[..., :slots].abs()
    return torch.nn.functional.pad(found, (0, slots - found.shape[2]))


@selection
def unlike_first(x: Tensor, score: Tensor, group: Tensor, count: int, bar: Tensor) -> tuple[Tensor, Tensor]:
    """Return (int64 (S, N), int64 (S, G)): the rank of each token in its group, and how many lead it.

    A token leads if its cosine to none of the leaders of its group with a larger score is above the bar; leaders come
    first, and each by falling score; scores of 0 and below do not lead. x: (S, N, D). score: float (S, N). group: int64
    (S, N), -1 for none. count: of groups. bar: float32 (S,). It waits for the device once per round.
    """
    there = group >= 0
    x = unit(x.masked_fill(~there[..., None], 0))
    rank = rank_within(score, group, there)
    near = (cosine(x, x, normed=True) > bar[:, None, None]) & (group[:, :, None] == group[:, None])
    near = near & there[:, :, None] & there[:, None]
    better = near & (rank[:, None] < rank[:, :, None])
    leads, open_ = torch.zeros_like(there), there & (score > 0)
    while bool(open_.any()):
        new = open_ & ~(better & open_[:, None]).any(2)
        leads = leads | new
        open_ = open_ & ~new & ~(near & new[:, None]).any(2)
    order = rank_within((leads.long() * rank.shape[1] - rank).double(), group, there)
    number = torch.zeros(len(group), count + 1, dtype=torch.int64, device=group.device)
    number = number.scatter_add(1, torch.where(leads, group, count), torch.ones_like(group))
    return order, number[:, :count]


@selection
def group_quotas(leaders: Tensor, members: Tensor, total: Tensor, lead: int) -> Tensor:
    """Return int64 (S, G), how many tokens each group gets: one each, the rest in proportion to its leaders.

    leaders, members: int64 (S, G), at most so many lead, and are there. total: int64 (S,), tokens asked for, `lead` of
    which are none of the groups' own. What rounding leaves goes to the groups of most leaders, the first on ties.
    """
    total = total[:, None]
    low = members.clamp(max=1)
    most = (5 * (-(-total // 64))).minimum(members).minimum(leaders)
    grown = torch.arange(int(members.max()) + 1, device=members.device)[None, :, None]
    grown = (most[:, None] + grown).minimum(members[:, None])
    enough = (grown.sum(2) >= total.minimum(members.sum(1, keepdim=True))).long().argmax(1)
    most = grown.gather(1, enough[:, None, None].expand(-1, 1, grown.shape[2]))[:, 0]
    rest = (total - low.sum(1, keepdim=True) - lead).clamp(min=0)
    share = leaders.float() / leaders.sum(1, keepdim=True).clamp(min=1)
    reached = (share.cumsum(1) * rest).round().long()
    quota = (reached.diff(dim=1, prepend=torch.zeros_like(rest)) + low).minimum(most)
    missing = rest + low.sum(1, keepdim=True) - quota.sum(1, keepdim=True)
    order = leaders.argsort(dim=1, descending=True, stable=True)
    spare = (most - quota).gather(1, order)
    more = (missing - (spare.cumsum(1) - spare)).clamp(min=0).minimum(spare)
    return quota + torch.zeros_like(quota).scatter(1, order, more)


@selection
def picked_of_parts(
    parts: Tensor, x: Tensor, score: Tensor | None, mask: Tensor, total: Tensor, groups: Tensor
) -> Tensor:
    """Return bool (S, N): tokens grouped by their largest part, the unlike ones of each group first.

    parts: (S, N, K), what each token has of the principal parts. x: (S, N, D), compared by their cosine. score: (S, N),
    None where a token is ranked by its part itself. mask: bool (S, N). total: int64 (S,), the picks, with a score one
    less than what the rule counts with, the CLS token. groups: int64 (S,), how many parts count.
    """
    slots, size = parts.shape[2], mask.sum(1)
    counts = torch.arange(slots, device=mask.device) < groups[:, None]
    part, group = parts.masked_fill(~counts[:, None], -1).max(2)
    group = group.masked_fill(~mask, -1)
    alike = cosine(x, x).masked_fill(~(mask[:, :, None] & mask[:, None]), 0)
    own = torch.diagonal(alike, dim1=1, dim2=2).sum(1)
    pairs = (alike.sum((1, 2)) - own) / 2
    if score is None:
        asked = total
        bar = (18 * total / size.clamp(min=1)).clamp(min=1) * (pairs + own) / size.square().clamp(min=1)
    else:
        asked = total + 1
        bar = asked / 32 * pairs / (size * (size - 1) / 2).clamp(min=1)
    order, leaders = unlike_first(x, part if score is None else score, group, slots, bar)
    members = torch.zeros(len(group), slots + 1, dtype=torch.int64, device=mask.device)
    members = members.scatter_add(1, torch.where(mask, group, slots), torch.ones_like(group))[:, :slots]
    quota = group_quotas(leaders, members, asked, int(score is not None))
    picked = mask & (order < quota.gather(1, group.clamp(min=0)))
    return torch.where((total >= size)[:, None], mask, picked)
