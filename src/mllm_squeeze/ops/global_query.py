"""Attention of one query that stands for all: the mean of those up to the end of a picture."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32, selection


@selection
def global_query_attention(query: Tensor, key: Tensor, among: Tensor) -> Tensor:
    """Return float32 (S, M), the attention that the mean query gives each key, softmax over those that take part.

    Mean over heads. query: (S, M, H, d). key: (S, M, Hkv, d), whose heads are repeated for those of the queries. among:
    bool (S, M), what takes part as query and as key.
    """
    query = at_least_float32(query).masked_fill(~among[..., None, None], 0)
    mean = query.sum(1) / among.sum(1).clamp(min=1)[:, None, None]
    key = at_least_float32(key).repeat_interleave(query.shape[2] // key.shape[2], 2)
    logits = torch.einsum("shd,smhd->shm", mean, key) / query.shape[-1] ** 0.5
    return logits.masked_fill(~among[:, None], -torch.inf).softmax(2).mean(1)
