"""Attention that keys receive from chosen rows, without ever holding a full attention map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from .kernels import available
from .precision import at_least_float32, selection

Join = Literal["mean", "sum", "max", "each"]

# Logits held at once by default: 2 ** 25 float32 numbers are 128 MiB.
_BLOCK_LOGITS = 1 << 25


def attention_band(
    queries: int,
    keys: int,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    like: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return two int32 (1, queries): the first key, and one past the last key, that each row sees.

    The last row stands at the last key. window: a row sees keys less than `window` away. cu_seqlens: int (n + 1,), the
    places where packed sequences start and the last one ends; rows see their own sequence only, and queries equals
    keys. like: a tensor on the device of the result.
    """
    device = cu_seqlens.device if cu_seqlens is not None else None if like is None else like.device
    place = torch.arange(keys - queries, keys, device=device)
    low, high = torch.zeros_like(place), torch.full_like(place, keys)
    if causal:
        high = place + 1
    if window is not None:
        low, high = (place - window + 1).clamp(min=0), high.minimum(place + window)
    if cu_seqlens is not None:
        own = torch.searchsorted(cu_seqlens, place, right=True).clamp(max=len(cu_seqlens) - 1)
        low, high = low.maximum(cu_seqlens[own - 1]), high.minimum(cu_seqlens[own])
    return low.int()[None], high.int()[None]


def _visible(
    allowed: Tensor | None, band: tuple[Tensor, Tensor] | None, start: int, stop: int, width: int
) -> Tensor | None:
    """Return bool (B or 1, 1, rows or 1, P), which keys the rows start to stop see; None where they see all."""
    if allowed is not None and allowed.shape[2] > 1:
        allowed = allowed[:, :, start:stop]
    if band is None:
        return allowed
    low, high = (side[:, None, start:stop, None] for side in band)
    keys = torch.arange(width, device=low.device)
    inside = (keys >= low) & (keys < high)
    return inside if allowed is None else inside & allowed


@selection
def attention_from_rows(
    query: Tensor,
    key: Tensor,
    row_weights: Tensor,
    allowed: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    block: int | None = None,
    band: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return float32 (B, P), the attention each key receives from the rows: mean over heads, weighted sum over rows.

    query: (B, H, R, d) and key: (B, Hkv, P, d), after rotary embedding; grouped heads share a key without repeating it.
    row_weights: (B, R), zero leaves a row out. allowed: bool (B or 1, 1, R or 1, P), None lets every row see every key.
    softcap: logits become softcap * tanh(logits / softcap). The softmax runs in float32 over all keys, for `block` rows
    at a time (None keeps the logits of a block within 128 MiB): memory O(B * H * block * P). band: two int (B or 1, R),
    first key and one past the last key that each row sees, each ascending over rows, as `attention_band` makes them.
    """
    if available(query):
        from .kernels import attention as fast

        if fast.supports(query, key, allowed):
            return fast.attention_from_rows(query, key, row_weights, allowed, scaling, softcap, band)
    batch, heads, _, _ = query.shape
    groups, width = key.shape[1], key.shape[2]
    weights = row_weights.to(at_least_float32(key).dtype)
    total = weights.new_zeros(batch, groups, 1, width)
    for start, stop, seen in blocks_of_attention(query, key, row_weights != 0, allowed, scaling, softcap, block, band):
        weight = weights[:, start:stop]
        shared = weight[:, None, None].expand(-1, groups, heads // groups, -1).reshape(batch, groups, 1, -1)
        total += shared @ seen.flatten(2, 3)
    return total.sum((1, 2)) / heads


def blocks_of_attention(
    query: Tensor,
    key: Tensor,
    row_mask: Tensor,
    allowed: Tensor | None,
    scaling: float,
    softcap: float | None,
    block: int | None,
    band: tuple[Tensor, Tensor] | None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, attention (B, Hkv, G, stop - start, P)) of some rows after the other; G heads share a key."""
    batch, heads, rows, dim = query.shape
    groups, width = key.shape[1], key.shape[2]
    block = block or max(1, _BLOCK_LOGITS // max(1, batch * heads * width))
    keys = at_least_float32(key).transpose(2, 3)
    for start in range(0, rows, block):
        stop = min(rows, start + block)
        # Rows that do not count may hold anything, even NaN (padding): 0 * NaN must not reach a sum.
        counts = row_mask[:, None, start:stop, None]
        q = torch.where(counts, at_least_float32(query[:, :, start:stop]), 0) * scaling
        logits = q.reshape(batch, groups, -1, dim) @ keys
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        # (B, Hkv, G * rows, P) is seen as (B, Hkv, G, rows, P) so that one mask serves all heads.
        logits = logits.view(batch, groups, heads // groups, stop - start, width)
        visible = _visible(allowed, band, start, stop, width)
        hidden = None if visible is None else ~visible[:, :, None]
        if hidden is not None:
            logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
        seen = logits.softmax(-1)
        yield start, stop, seen if hidden is None else seen.masked_fill(hidden, 0)


@selection
def attention_joined(
    query: Tensor,
    key: Tensor,
    row_mask: Tensor,
    allowed: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    heads: Join = "mean",
    over_rows: Join = "mean",
    block: int | None = None,
    band: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the attention each key receives from the rows, joined over heads first, then over rows; float32.

    Arguments as in `attention_from_rows`, but row_mask: bool (B, R), False leaves a row out. heads, over_rows: "each"
    leaves an axis, so that it is (B, P), (B, H, P), (B, R, P) or (B, H, R, P). Memory is that of the result and of one
    block; where both are a mean or a sum, of the result alone.
    """
    if {heads, over_rows} <= {"mean", "sum"}:
        weights = row_mask.float()
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1) if over_rows == "mean" else weights
        found = attention_from_rows(query, key, weights, allowed, scaling, softcap, block, band)
        return found * query.shape[1] if heads == "sum" else found
    parts: list[Tensor] = []
    total: Tensor | None = None
    for start, stop, seen in blocks_of_attention(query, key, row_mask, allowed, scaling, softcap, block, band):
        seen = _join_heads(seen.flatten(1, 2), heads)
        seen = seen.masked_fill(~row_mask[:, None, start:stop, None], 0)
        if over_rows == "each":
            parts.append(seen)
        elif over_rows == "max":
            best = seen.amax(2)
            total = best if total is None else total.maximum(best)
        else:
            total = seen.sum(2) if total is None else total + seen.sum(2)
    if over_rows == "each":
        found = torch.cat(parts, dim=2)
    else:
        assert total is not None
        count = row_mask.sum(1).clamp(min=1)[:, None, None]
        found = total / count if over_rows == "mean" else total
    return found if heads == "each" else found.squeeze(1)


def _join_heads(seen: Tensor, heads: Join) -> Tensor:
    """Join the heads of (B, H, r, P) to (B, 1, r, P), or leave them."""
    if heads == "each":
        return seen
    if heads == "max":
        return seen.amax(1, keepdim=True)
    return seen.mean(1, keepdim=True) if heads == "mean" else seen.sum(1, keepdim=True)


@selection
def rows_that_see(
    row_mask: Tensor,
    width: int,
    allowed: Tensor | None,
    band: tuple[Tensor, Tensor] | None = None,
    block: int | None = None,
) -> Tensor:
    """Return float32 (B, P), how many of the rows see each key.

    row_mask: bool (B, R). width: P. allowed, band, block: as in `attention_from_rows`.
    """
    batch, rows = row_mask.shape
    if allowed is None and band is None:
        return row_mask.sum(1, keepdim=True).float().expand(-1, width)
    block = block or max(1, _BLOCK_LOGITS // max(1, batch * width))
    total = torch.zeros(batch, width, device=row_mask.device)
    for start in range(0, rows, block):
        stop = min(rows, start + block)
        visible = _visible(allowed, band, start, stop, width)
        assert visible is not None
        total += (visible[:, 0] & row_mask[:, start:stop, None]).sum(1)
    return total


@selection
def attention_received(
    query: Tensor,
    key: Tensor,
    allowed: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    row_mask: Tensor | None = None,
    block: int | None = None,
    band: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return float32 (B, P), the attention that each key receives from all rows, summed over rows and heads.

    Arguments as in `attention_from_rows`; row_mask: bool (B, R), False leaves a row out (padding).
    """
    batch, heads, rows, _ = query.shape
    weights = torch.ones(batch, rows, device=query.device) if row_mask is None else row_mask.float()
    return attention_from_rows(query, key, weights, allowed, scaling, softcap, block, band) * heads


@selection
def attention_to_itself(
    query: Tensor,
    key: Tensor,
    allowed: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    block: int | None = None,
    band: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return float32 (B, P), the attention that each token gives itself, summed over heads.

    Arguments as in `attention_from_rows`; there are as many rows as keys. Memory is that of one block.
    """
    rows = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
    found = [
        seen.flatten(1, 2).sum(1)[:, :, start:stop].diagonal(dim1=1, dim2=2)
        for start, stop, seen in blocks_of_attention(query, key, rows, allowed, scaling, softcap, block, band)
    ]
    return torch.cat(found, 1)
