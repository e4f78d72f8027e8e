"""Which tokens say what others say and the words do not ask for, and where such a token goes."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention_joined
from .precision import at_least_float32, selection
from .select import positions, take

Entries = tuple[Tensor, Tensor, Tensor, Tensor]


@selection
def head_mean_logits(query: Tensor, key: Tensor) -> Tensor:
    """Return float32 (S, A, B), query . key / sqrt(d), mean over heads, whatever sees what.

    query: (S, A, H, d). key: (S, B, Hkv, d), each for H / Hkv heads.
    """
    heads, dim = query.shape[2:]
    # Heads that share a key are one query: the sum of theirs.
    query = at_least_float32(query).unflatten(2, (key.shape[2], -1)).sum(3).flatten(2)
    return query @ at_least_float32(key).flatten(2).transpose(1, 2) / (heads * dim**0.5)


@selection
def open_attention(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Return float32 (S, A, B), attention of all rows to all keys that are there, early or late, mean over heads.

    query: (S, A, H, d). key: (S, B, Hkv, d). mask: bool (S, B). Memory O(A * B), and that of one block.
    """
    rows = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
    # What padding holds may be no number, which a weight of 0 would not hide.
    key = key.masked_fill(~mask[..., None, None], 0).transpose(1, 2)
    allowed = mask[:, None, None]
    query = query.nan_to_num().transpose(1, 2)
    return attention_joined(query, key, rows, allowed, query.shape[-1] ** -0.5, over_rows="each")


@selection
def redundancy(own: Tensor, asked: Tensor, mask: Tensor, words: Tensor, share: float, mean: bool) -> Tensor:
    """Return float32 (S, N): share * what a token gives the visual ones - (1 - share) * its mean to the words.

    own: (S, N, N). asked: (S, N, T). mask: bool (S, N). words: bool (S, T). mean: of what it gives the visual ones, or
    the sum.
    """
    given = own.masked_fill(~mask[:, None], 0).sum(2)
    given = given / mask.sum(1, keepdim=True).clamp(min=1) if mean else given
    to_words = asked.masked_fill(~words[:, None], 0).sum(2) / words.sum(1, keepdim=True).clamp(min=1)
    return share * given - (1 - share) * to_words


@selection
def correlation(
    direct: Tensor, to_words: Tensor, from_words: Tensor, words: Tensor, share: float, mean: bool
) -> Tensor:
    """Return float32 (S, R, N): share * direct + (1 - share) * what goes by the words, to_words @ from_words.

    direct: (S, R, N). to_words: (S, R, T). from_words: (S, T, N). words: bool (S, T). mean: over the words, or the sum.
    """
    there = words[:, None]
    indirect = to_words.masked_fill(~there, 0) @ from_words.masked_fill(~there.transpose(1, 2), 0)
    count = words.sum(1).clamp(min=1)[:, None, None] if mean else 1
    return share * direct + (1 - share) * indirect / count


@selection
def entries_to_correlated(
    alike: Tensor, index: Tensor, filled: Tensor, keep: Tensor, among: Tensor, number: Tensor, slots: int, normed: bool
) -> Entries:
    """Return (span, into, source, weight), each (E,): removed tokens go to those they are most alike, others stay.

    alike: (S, R, N), of the removed tokens index (S, R), of which `filled` are some. keep: bool (S, N). among: bool
    (S, N), who is looked at; what goes to one that does not stay is lost. number: int64 (S,), how many each goes to,
    the first ones on ties. slots: host number, at least the largest. normed: weights are in proportion to `alike`, and
    a survivor becomes the mean weighted by 1 and these; else they are the softmax, and are added.
    """
    itself = positions(keep)[:, None]
    alike = at_least_float32(alike).masked_fill(~among[:, None] | (itself == index[..., None]), -torch.inf)
    value, into = alike.sort(dim=2, descending=True, stable=True)
    value, into = value[..., :slots], into[..., :slots]
    taken = (torch.arange(slots, device=keep.device) < number[:, None, None]) & filled[..., None] & value.isfinite()
    if normed:
        weight = value.masked_fill(~taken, 0)
        weight = weight / weight.sum(2, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    else:
        weight = value.masked_fill(~taken, -torch.inf).softmax(2).nan_to_num(0)
    taken = taken & take(keep, into.flatten(1)).view(into.shape)
    weight = weight.masked_fill(~taken, 0)
    # What goes nowhere is nothing from the first survivor to itself.
    first = keep.int().argmax(1)[:, None]
    into = torch.where(taken, into, first[..., None]).flatten(1)
    source = torch.where(taken, index[..., None], first[..., None]).flatten(1)
    given, own = weight.flatten(1), keep.to(weight.dtype)
    if normed:
        total = (own + torch.zeros_like(own).scatter_add(1, into, given)).clamp(min=1)
        given, own = given / total.gather(1, into), own / total
    stays = torch.where(keep, positions(keep), first)
    into, source = torch.cat([stays, into], 1), torch.cat([stays, source], 1)
    span = torch.arange(len(keep), device=keep.device)[:, None].expand_as(into)
    return span.flatten(), into.flatten(), source.flatten(), torch.cat([own, given], 1).flatten()
