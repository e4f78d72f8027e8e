"""What queries of words and keys of visual tokens say of each other, head by head, without a softmax over all keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32, selection


@selection
def query_key_products(query: Tensor, words: Tensor, key: Tensor) -> Tensor:
    """Return float32 (S, H, N), the mean over words of query * key / sqrt(d); what is no number counts as 0.

    query: (S, T, H, d). words: bool (S, T). key: (S, N, Hkv, d), whose heads are repeated for those of the queries.
    """
    count = words.sum(1).clamp(min=1)[:, None, None]
    mean = at_least_float32(query).masked_fill(~words[..., None, None], 0).sum(1) / count
    key = at_least_float32(key).repeat_interleave(query.shape[2] // key.shape[2], 2)
    products = torch.einsum("shd,snhd->shn", mean, key) / query.shape[-1] ** 0.5
    return products.nan_to_num(0, posinf=0, neginf=0)


@selection
def weighted_heads(products: Tensor, mask: Tensor, weights: Tensor | None, how: str) -> Tensor:
    """Return float32 (S, N), the sum over heads of their products, each head brought to one scale over the tokens.

    products: float32 (S, H, N). mask: bool (S, N). weights: float32 (H,), None where all heads count alike. how: "l2"
    to length 1, "softmax" to a sum of 1, "minmax" to [0, 1], "none".
    """
    there = mask[:, None]
    inside = products.masked_fill(~there, 0)
    if how == "l2":
        length = torch.linalg.vector_norm(inside, dim=2, keepdim=True)
        inside = inside / length.clamp(min=1e-12)
    elif how == "softmax":
        inside = products.masked_fill(~there, -torch.inf).softmax(2)
    elif how == "minmax":
        low = products.masked_fill(~there, torch.inf).amin(2, keepdim=True)
        high = products.masked_fill(~there, -torch.inf).amax(2, keepdim=True)
        inside = (inside - low) / (high - low).clamp(min=1e-12)
    if weights is None:
        return inside.mean(1)
    return (inside * weights[None, :, None]).sum(1)
