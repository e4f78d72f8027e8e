"""Attention of one query with its heads undivided."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32, selection
from .segment import segment_sum


@selection
def undivided_attention(query: Tensor, key: Tensor, own: Tensor, label: Tensor, count: int) -> Tensor:
    """Return float32 (S, N), softmax(query . key / sqrt(d)) over the tokens of a group and the query's own key.

    query, own: (S, N, d), the query and its own key, the same for all tokens of a group. key: (S, N, d). label: int64
    (S, N), from 0 to count - 1, -1 for none. Tokens whose query is zero (separators) get -inf.
    """
    query, key, own = (at_least_float32(x) for x in (query, key, own))
    there = (label >= 0) & (query != 0).any(-1)
    group = torch.where(there, label, count)
    scaled = query / query.shape[-1] ** 0.5
    logits = (scaled * key).sum(-1).masked_fill(~there, -torch.inf)
    self_logits = (scaled * own).sum(-1).masked_fill(~there, -torch.inf)
    # The query's own key is one more key: the same number stands at every token of the group.
    top = logits.new_full((len(label), count + 1), -torch.inf)
    top = top.scatter_reduce(1, group, torch.maximum(logits, self_logits), "amax").gather(1, group)
    top = top.masked_fill(~there, 0)
    exponent = (logits - top).exp()
    total = segment_sum(exponent, group.masked_fill(~there, -1), count).gather(1, label.clamp(min=0))
    return (exponent / (total + (self_logits - top).exp())).masked_fill(~there, -torch.inf)
