"""Attention scores from the queries and keys that a tap reads where attention is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream import masks
from mllm_squeeze.upstream.attention_call import AttentionCall
from mllm_squeeze.upstream.attention_tap import Listener, Tap

__all__ = ["AttentionCall", "Listener", "Tap", "score_rows"]


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
    allowed = _allowed(call, rows, causal)
    return ops.attention_from_rows(picked, call.key, weights, allowed, scaling=call.logit_scale, softcap=call.softcap)


def _allowed(call: AttentionCall, rows: Tensor, causal: bool) -> Tensor | None:
    """Return bool (B, 1, R or 1, P), which keys each chosen row may see; None where all see all."""
    mask, queries, keys = call.mask, call.query.shape[2], call.key.shape[2]
    if _is_square(mask):
        mask = mask[..., :keys].expand(rows.shape[0], -1, -1, -1)
        picked = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        masks.require_unbiased(picked)
        return masks.is_open(picked)
    real = None if mask is None else masks.is_open(mask)[:, None, None, -keys:]
    if not causal and call.window is None:
        return real
    ahead = torch.arange(keys, device=rows.device) - (rows[:, None, :, None] + (keys - queries))
    near = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    near = near if call.window is None else near & (ahead.abs() < call.window)
    return near if real is None else near & real


def _is_square(mask: object) -> bool:
    """True for a mask of keys by queries, False for one of keys or none."""
    form = masks.form(mask)
    if form not in ("none", "keys", "square"):
        raise UnsupportedInputError(
            f"Scores cannot be read under an attention mask of type {type(mask).__name__}. Load the model with "
            "attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
        )
    return form == "square"
