"""How often a walk comes by each token that goes from token to token as they attend to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention_band, blocks_of_attention
from .precision import selection


@selection
def page_rank(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    keys: Tensor,
    temperature: float,
    steps: int,
    block: int | None = None,
) -> Tensor:
    """Return float32 (S, M), where a walk is after so many steps, joined over heads by the root of the mean square.

    It begins at every token alike and goes by causal attention, whose logits are divided by the temperature. query: (S,
    M, H, d), in the order of the prompt. key: (S, M, Hkv, d), each for H / Hkv heads. rows, keys: bool (S, M), the
    tokens at which it may begin, and to which it may go. block: rows computed at once. Attention is computed anew for
    each step; memory is that of one block.
    """
    batch, width, heads, dim = query.shape
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    groups = key.shape[1]
    scaling = dim**-0.5 / temperature
    band = attention_band(width, width, like=query)
    start_at = rows.float() / rows.sum(1, keepdim=True).clamp(min=1)
    here = start_at[:, None, None].expand(batch, groups, heads // groups, width)
    for _ in range(steps):
        there = torch.zeros_like(here)
        for start, stop, seen in blocks_of_attention(query, key, rows, keys[:, None, None], scaling, None, block, band):
            there += (here[..., None, start:stop] @ seen)[..., 0, :]
        here = there
    return here.flatten(1, 2).square().mean(1).sqrt().masked_fill(~rows, 0)
