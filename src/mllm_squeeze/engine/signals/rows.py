"""Attention scores from the queries and keys that a tap reads where attention is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream import masks
from mllm_squeeze.upstream.attention_call import AttentionCall
from mllm_squeeze.upstream.attention_tap import Listener, Tap

__all__ = ["AttentionCall", "Listener", "Tap", "score_joined", "score_rows"]


def score_rows(call: AttentionCall, rows: Tensor, weights: Tensor, causal: bool = True) -> Tensor:
    """Return the attention that each key receives from chosen query rows, mean over heads, weighted over rows.

    rows: int64 (B, R), queries of the call. weights: float32 (B, R), 0 for padding. causal: whether a mask that is None
    or 2-D leaves later keys closed, where the call itself does not say so. Returns float32 (B, P).

    Raises:
        UnsupportedModelError: the call says something about scores that is not taken into account.
        UnsupportedInputError: so does its mask, or nobody has looked at its form.
    """
    call.require_plain_scores()
    heads, dim = call.query.shape[1], call.query.shape[3]
    picked = call.query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim))
    causal = causal if call.is_causal is None else call.is_causal
    allowed, band = _seen(call, rows, causal)
    return ops.attention_from_rows(
        picked, call.key, weights, allowed, scaling=call.logit_scale, softcap=call.softcap, band=band
    )


def score_joined(
    call: AttentionCall,
    rows: Tensor | None,
    row_mask: Tensor,
    causal: bool,
    heads: ops.Join = "mean",
    over_rows: ops.Join = "mean",
    per_key: bool = False,
) -> Tensor:
    """Return the attention that each key receives from chosen query rows, joined as asked; float32 (B, ..., P).

    rows: int64 (B, R), ascending, None for all. row_mask: bool (B, R), which of them count. causal: as for
    `score_rows`. heads, over_rows: as for `ops.attention_joined`. per_key: the mean over rows is over those that see
    the key.

    Raises:
        UnsupportedModelError, UnsupportedInputError: as `score_rows`.
    """
    call.require_plain_scores()
    causal = causal if call.is_causal is None else call.is_causal
    picked = call.query
    if rows is not None:
        picked = picked.gather(2, rows[:, None, :, None].expand(-1, picked.shape[1], -1, picked.shape[3]))
    allowed, band = _seen(call, rows, causal)
    per_key = per_key and over_rows == "mean"
    scores = ops.attention_joined(
        picked,
        call.key,
        row_mask,
        allowed,
        scaling=call.logit_scale,
        softcap=call.softcap,
        heads=heads,
        over_rows="sum" if per_key else over_rows,
        band=band,
    )
    if not per_key:
        return scores
    seen = ops.rows_that_see(row_mask, call.key.shape[2], allowed, band).clamp(min=1)
    return scores / (seen[:, None] if heads == "each" else seen)


def _seen(call: AttentionCall, rows: Tensor | None, causal: bool) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """Return which keys each row may see: bool (B, 1, R or 1, P) or None, and a band or None, as the ops take them."""
    mask, queries, keys = call.mask, call.query.shape[2], call.key.shape[2]
    if _is_square(mask):
        mask = mask[..., :keys]
        if rows is not None and mask.shape[2] > 1:
            mask = mask.expand(rows.shape[0], -1, -1, -1)
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        masks.require_unbiased(mask)
        return masks.is_open(mask), None
    real = None if mask is None else masks.is_open(mask)[:, None, None, -keys:]
    if not causal and call.window is None:
        return real, None
    # Rows that do not count stand behind the others; a band rises over all rows.
    place = torch.arange(queries, device=call.query.device)[None] if rows is None else rows.cummax(1).values
    place = place + (keys - queries)
    low, high = torch.zeros_like(place), torch.full_like(place, keys)
    if causal:
        high = place + 1
    if call.window is not None:
        low, high = (place - call.window + 1).clamp(min=0), high.minimum(place + call.window)
    return real, (low.int(), high.int())


def _is_square(mask: object) -> bool:
    """True for a mask of keys by queries, False for one of keys or none."""
    form = masks.form(mask)
    if form not in ("none", "keys", "square"):
        raise UnsupportedInputError(
            f"Scores cannot be read under an attention mask of type {type(mask).__name__}. Load the model with "
            "attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
        )
    return form == "square"
