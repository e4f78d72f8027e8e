"""What a need takes from one block of the vision encoder: a row of values for each of its tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mllm_squeeze import ops
from mllm_squeeze.engine.signals.rows import AttentionCall, score_joined, score_rows
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.reducers.needs import EncoderAttention, EncoderProjection, EncoderStates, Heads, HeadsOfStates
from mllm_squeeze.upstream import masks, pooling_head


def read_attention(need: EncoderAttention, call: AttentionCall, parts: ModelParts) -> Tensor:
    """Return what each token receives in a block, float32 (tiles, N), or (tiles, N, H) of each head."""
    of_cls = need.rows == "cls" or (need.rows == "cls_or_all" and parts.has_cls)

    def score(one: AttentionCall) -> Tensor:
        if need.rows == "outliers":
            return _from_outliers(one, need.factor)
        if need.rows == "others":
            return _from_others(one, parts)
        return _from_cls(one, parts.cls_place) if of_cls else received(one)

    return _over_heads(score, call, need.heads)


def read_probe(need: EncoderAttention, states: Tensor, real: Tensor | None, model: nn.Module) -> Tensor:
    """Return what each token receives from the query of the pooling head, shapes as in `read_attention`.

    states: (tiles, N, D) of the block. real: bool (tiles, N), False for padding. model: that has the head.
    """
    query, key = pooling_head.query_and_keys(model, states)
    allowed = None if real is None else real[:, None, None, :]

    def score(one: AttentionCall) -> Tensor:
        weights = query.new_full((len(query), 1), one.query.shape[1], dtype=torch.float32)
        return ops.attention_from_rows(one.query, one.key, weights, allowed, scaling=one.logit_scale)

    return _over_heads(score, AttentionCall(model, query, key, key, None), need.heads)


def read_projection(need: EncoderProjection, call: AttentionCall, parts: ModelParts) -> Tensor:
    """Return the vectors of each token: (tiles, N, d), (tiles, N, H * d) or (tiles, N, H, d)."""
    states: Tensor = {"query": call.query, "key": call.key, "value": call.value}[need.what]
    joined = _joined(states, need.heads)
    return _of_cls(joined, parts) if need.cls else joined


def read_states(need: EncoderStates, states: Tensor, parts: ModelParts) -> Tensor:
    """Return the states (tiles, N, D) that a block gave."""
    return _of_cls(states, parts) if need.cls else states


def received(call: AttentionCall) -> Tensor:
    """Return the attention that each key receives from all queries that see it, summed over heads, float32 (B, P).

    A mask keeps pictures apart that are packed into one row; padding is no query.

    Raises:
        UnsupportedModelError: the call says something about scores that is not taken into account.
        UnsupportedInputError: so does its mask, or nobody has looked at its form.
    """
    call.require_plain_scores()
    allowed, band = _seen_by_all(call)
    real = None if allowed is None else allowed.any(2)[:, 0]
    return ops.attention_received(
        call.query, call.key, allowed, scaling=call.logit_scale, softcap=call.softcap, row_mask=real, band=band
    )


def _seen_by_all(call: AttentionCall) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """Return which keys each query sees, by the mask of a call and by its place, as the ops take them."""
    band = None
    if call.is_causal or call.window is not None:
        sizes = call.query.shape[2], call.key.shape[2]
        band = ops.attention_band(*sizes, bool(call.is_causal), call.window, like=call.query)
    return None if call.mask is None else open_keys(call), band


def open_keys(call: AttentionCall) -> Tensor:
    """Return bool (B, 1, M or 1, P), which keys each query sees by the mask of a call."""
    if masks.form(call.mask) == "square":
        masks.require_unbiased(call.mask)
        return masks.is_open(call.mask).expand(call.query.shape[0], -1, -1, -1)
    return masks.is_open(call.mask)[:, None, None, :]


def real_keys(call: AttentionCall) -> Tensor | None:
    """Return bool (B, P), the keys that anyone sees, None where all are seen."""
    return None if call.mask is None else open_keys(call).any(2)[:, 0]


def _from_cls(call: AttentionCall, place: int) -> Tensor:
    batch, heads, count, _ = call.query.shape
    row = torch.full((batch, 1), place % count, dtype=torch.long, device=call.query.device)
    # The sum over heads, as `received` gives it.
    weights = torch.full_like(row, heads, dtype=torch.float32)
    return score_rows(call, row, weights, causal=False)


def _from_others(call: AttentionCall, parts: ModelParts) -> Tensor:
    """Return what each key receives from the patches beside it: all rows, less its own and that of the CLS token."""
    allowed, band = _seen_by_all(call)
    own = ops.attention_to_itself(
        call.query, call.key, allowed, scaling=call.logit_scale, softcap=call.softcap, band=band
    )
    found = received(call) - own
    return found - _from_cls(call, parts.cls_place) if parts.has_cls else found


def _from_outliers(call: AttentionCall, factor: float) -> Tensor:
    """Return the mean attention from the tokens that receive more than `factor` times the average, else from all."""
    # Each query gives 1 in all, so that a key of a picture receives 1 on average, whatever is packed beside it.
    outliers = received(call) > factor * call.query.shape[1]
    real = real_keys(call)
    everyone = torch.ones_like(outliers) if real is None else real

    def mean_of(rows: Tensor) -> Tensor:
        return score_joined(call, None, rows, causal=False, heads="sum", per_key=True)

    marked = mean_of(outliers)
    return torch.where(marked > 0, marked, mean_of(everyone))


def _over_heads(score: Callable[[AttentionCall], Tensor], call: AttentionCall, heads: Heads) -> Tensor:
    """Join heads; score: gives the sum over the heads of a call."""
    count = call.query.shape[1]
    if heads == "sum":
        return score(call)
    if heads == "mean":
        return score(call) / count
    group = count // call.key.shape[1]
    each = torch.stack(
        [
            score(call.replace(query=call.query[:, n : n + 1], key=call.key[:, n // group : n // group + 1]))
            for n in range(count)
        ],
        dim=-1,
    )
    return each if heads == "each" else each.amax(-1)


def _joined(states: Tensor, heads: HeadsOfStates) -> Tensor:
    if heads == "mean":
        return states.float().mean(1)
    by_token = states.transpose(1, 2)
    return by_token if heads == "each" else by_token.flatten(2)


def _of_cls(values: Tensor, parts: ModelParts) -> Tensor:
    """Return the CLS token's values in the place of each token's."""
    place = parts.cls_place % values.shape[1]
    return values[:, place : place + 1].expand_as(values)
