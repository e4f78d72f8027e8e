"""Tokens that take up those most like them: one token may go into several."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import selection
from .score import cosine, unit
from .select import best_first, positions, take

Entries = tuple[Tensor, Tensor, Tensor, Tensor]


@selection
def neighbour_entries(
    x: Tensor, weight: Tensor, centres: Tensor, label: Tensor, count: int, slots: int, bonus: Tensor | None = None
) -> Entries:
    """Return (span, into, source, weight), each (E,): each centre stays and adds its most alike tokens, weighted.

    The most alike are the `count` other tokens of its group of largest cosine, other centres included; ties take the
    lowest index. x: (S, N, d). weight: float32 (S, N), of each token. centres: bool (S, N). label: int64 (S, N), -1 for
    tokens that do not count. slots: host number, at least the largest number of centres of a span. bonus: (S, N), what
    is added to the cosine to each token. Where there are fewer, an entry of weight 0 fills the place.
    """
    index, filled = best_first(centres.float(), centres, slots)
    x = unit(x.masked_fill((label < 0)[..., None], 0))
    alike = cosine(take(x, index), x, normed=True)
    alike = alike if bonus is None else alike + bonus.masked_fill(label < 0, 0)[:, None]
    other = (take(label, index)[..., None] == label[:, None]) & (positions(label)[:, None] != index[..., None])
    order = alike.nan_to_num().masked_fill(~other, -torch.inf).argsort(dim=2, descending=True, stable=True)
    order = order[..., :count]
    found = other.gather(2, order) & filled[..., None]
    added = weight[:, None].expand(-1, slots, -1).gather(2, order).masked_fill(~found, 0)
    itself = index[..., None]
    source = torch.cat([itself, torch.where(found, order, itself)], 2)
    weights = torch.cat([filled[..., None].float(), added.float()], 2)
    span = torch.arange(len(x), device=x.device)[:, None, None].expand_as(source)
    # What fills an unused place stays itself.
    return span.flatten(), itself.expand_as(source).flatten(), source.flatten(), weights.flatten()


@selection
def group_sum_entries(weight: Tensor, members: Tensor, place: Tensor, label: Tensor, count: int) -> Entries:
    """Return (span, into, source, weight), each (S * N,): the weighted sum of the members of each group, at its place.

    A token of no group stays as it is; one that is no member adds nothing. weight: float32 (S, N). members, place: bool
    (S, N), one place in each group at most. label: int64 (S, N), -1 for none.
    """
    at = torch.zeros(len(label), count + 1, dtype=torch.int64, device=label.device)
    target = torch.where(place & (label >= 0), label, count)
    itself = positions(label).expand_as(label)
    at = at.scatter(1, target, itself)
    member = members & (label >= 0)
    into = torch.where(member, at.gather(1, label.clamp(min=0)), itself)
    amount = torch.where(member, weight.float(), (label < 0).float())
    span = torch.arange(len(label), device=label.device)[:, None].expand_as(label)
    return span.flatten(), into.flatten(), itself.flatten(), amount.flatten()


@selection
def unchanged_entries(stays: Tensor) -> Entries:
    """Return (span, into, source, weight), each (S * N,): each of some tokens stays as it is. stays: bool (S, N).

    An entry of weight 0 fills the place of any other token.
    """
    token = positions(stays).expand_as(stays)
    span = torch.arange(len(stays), device=stays.device)[:, None].expand_as(stays)
    return span.flatten(), token.flatten(), token.flatten(), stays.float().flatten()
