"""A decode step on a cache of fixed size: tensor work of fixed shape only, so that torch.compile can trace it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze.engine.kv import ask as kv
from mllm_squeeze.engine.kv.layers import StaticCutLayer
from mllm_squeeze.engine.sequence.prefill import Prefill
from mllm_squeeze.engine.sequence.shorten import is_flash
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.upstream import masks
from mllm_squeeze.upstream.calls import LayerCall, cache_of, is_one_token


def is_static_step(kwargs: Mapping[str, Any]) -> bool:
    """True where a model is given one token per row and a cache of fixed size; kwargs: of the text model."""
    return is_one_token(kwargs) and kv.is_static(cache_of(kwargs))


def is_traced_step(kwargs: Mapping[str, Any]) -> bool:
    """True while torch.compile traces such a step; what the engine notes about calls would only be guarded against."""
    return torch.compiler.is_compiling() and is_static_step(kwargs)


def refuse_static(prefill: Prefill, cache: Any) -> None:
    """Check that what a prefill does works on a cache of fixed size, if it is one.

    Raises:
        UnsupportedInputError: FlashAttention, whose masks have no columns, or a method that goes on while decoding.
    """
    if not kv.is_static(cache):
        return
    if prefill.plan.decode is not None:
        raise UnsupportedInputError(
            f"'{prefill.plan.decode.name}' chooses anew while decoding, which a static cache cannot follow. Use "
            "cache_implementation='dynamic' (the default of generate)."
        )
    if is_flash(prefill.implementation):
        raise UnsupportedInputError(
            f"A static cache cannot be cut under {prefill.implementation}, whose masks do not tell the slots that are "
            "still empty. Load the model with attn_implementation='sdpa', or use a dynamic cache."
        )


def serve_step(parts: ModelParts, number: int, call: LayerCall) -> LayerCall | None:
    """Return the call of one layer in a decode step, None where its cache layer was not cut.

    call: with hidden states (B, 1, D). Raises:
        UnsupportedInputError: the mask is not 4-D.
    """
    layer = kv.layer_at(call.cache, number)
    if not isinstance(layer, StaticCutLayer) or layer.entries is None:
        return None
    new = call.replace(mask=_mask(layer, call.mask))
    if layer.entries.repack:
        # The same place in every layer in front of the cut and behind it, but for the tokens that are gone.
        positions = call.positions - layer.entries.shift[:, None]
        # A layer that is given no tables has no positions.
        rope = None if call.rope is None else parts.rotate(number, call.hidden, positions)
        new = new.replace(positions=positions, rope=rope)
    layer.served = True
    return new


def _mask(layer: StaticCutLayer, mask: Any) -> Tensor:
    """Return the columns (B, H, 1, slots) of a mask (B, H, 1, all tokens) that the slots of a layer stand for."""
    if masks.form(mask) != "square":
        raise UnsupportedInputError(
            f"A static cache was cut, and the mask of a decode step is a {type(mask).__name__}; expected 4-D. Load the "
            "model with attn_implementation='sdpa' or 'eager'."
        )
    columns = layer.columns[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    short = mask.expand(columns.shape[0], -1, -1, -1).gather(-1, columns)
    if layer.open is None:
        return short
    return masks.close(short, ~layer.open[:, None, None, :])
