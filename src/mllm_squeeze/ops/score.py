"""Scores of tokens: cosine similarities, and attention received, without ever holding a full attention map."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import available
from .precision import at_least_float32, selection

# Logits held at once by default: 2 ** 25 float32 numbers are 128 MiB.
_BLOCK_LOGITS = 1 << 25

_GRAINS = float(1 << 30)


def unit(x: Tensor) -> Tensor:
    """Return x (..., D) scaled to length 1 in float32 or better; zero vectors stay zero."""
    x = at_least_float32(x)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp(min=torch.finfo(x.dtype).tiny)


def own_variance(x: Tensor, mask: Tensor, quality: Tensor | None) -> Tensor:
    """Return float32 (S, N), the diagonal of the kernel of `dpp_map`: quality squared, 0 for zero vectors and padding.

    Exactly 1 where all count alike, so that the first pick is the first token, not a matter of rounding.
    """
    variance = ((x != 0).any(2) & mask).to(at_least_float32(x).dtype)
    return variance if quality is None else variance * quality.to(variance.dtype).square()


def in_grains(value: Tensor) -> Tensor:
    """Return int64, the values in grains of 2 ** -30: sums are exact then, whatever their order, and ties are ties."""
    return (value.double().nan_to_num() * _GRAINS).round().long()


def likeness(products: Tensor, mask: Tensor) -> Tensor:
    """Return int32 (S, N, N), (1 + cosine) / 2 in grains, symmetric to the last of them, 0 to padding.

    products: float (S, N, N), the cosine of all pairs; it is overwritten.
    """
    alike = products.clamp_(max=1).add_(1).mul_(0.5)
    # Of two tokens that are alike only to each other, either adds the same: rounding must not decide.
    alike.diagonal(dim1=1, dim2=2).fill_(1)
    alike.masked_fill_(~(mask[:, :, None] & mask[:, None]), 0)
    return torch.maximum(alike, alike.transpose(1, 2)).mul_(_GRAINS).round_().int()


@selection
def cosine(a: Tensor, b: Tensor, normed: bool = False) -> Tensor:
    """Return float32 (S, A, B), the cosine between each pair of rows of a (S, A, D) and b (S, B, D).

    normed: the rows already have length 1.
    """
    if not normed:
        a, b = unit(a), unit(b)
    return a @ b.transpose(1, 2)


@selection
def paired_cosine(x: Tensor, partner: Tensor) -> Tensor:
    """Return float32 (S, N), the cosine between each token of x (S, N, D) and x[partner]; 0 where partner is -1.

    partner: int64 (S, N).
    """
    x = unit(x)
    other = x.gather(1, partner.clamp(min=0)[..., None].expand_as(x))
    return (x * other).sum(-1).masked_fill(partner < 0, 0)


@selection
def text_relevance(visual: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """Return float32 (S, T), how much visual tokens look at each text token: softmax over the text, mean over visual.

    Raw dot products, not scaled. visual: (S, N, D) with mask bool (S, N); text: (S, T, D) with text_mask bool (S, T).
    """
    logits = at_least_float32(visual) @ at_least_float32(text).transpose(1, 2)
    logits = logits.masked_fill(~text_mask[:, None], torch.finfo(logits.dtype).min)
    share = logits.softmax(2).masked_fill(~mask[..., None], 0)
    return share.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def gaussian_kernels(square: Tensor) -> Tensor:
    """Return the sum of exp(-square / (2 * a)) over a = 1/8, 1/4, 1/2, 1, 2, elementwise; in (0, 5]."""
    return torch.stack([(-square / (2 * 2.0**k)).exp() for k in range(-3, 2)]).sum(0)


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
    batch, heads, rows, dim = query.shape
    groups, width = key.shape[1], key.shape[2]
    block = block or max(1, _BLOCK_LOGITS // max(1, batch * heads * width))
    keys = at_least_float32(key).transpose(2, 3)
    weights = row_weights.to(keys.dtype)
    total = keys.new_zeros(batch, groups, 1, width)
    for start in range(0, rows, block):
        stop = min(rows, start + block)
        weight = weights[:, start:stop]
        # Rows of no weight may hold anything, even NaN (padding): 0 * NaN must not reach the sum.
        q = torch.where(weight[:, None, :, None] != 0, at_least_float32(query[:, :, start:stop]), 0) * scaling
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
        if hidden is not None:
            seen = seen.masked_fill(hidden, 0)
        shared = weight[:, None, None].expand(-1, groups, heads // groups, -1).reshape(batch, groups, 1, -1)
        total += shared @ seen.flatten(2, 3)
    return total.sum((1, 2)) / heads


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
