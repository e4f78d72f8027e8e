"""Reads a prompt: its features, its layout, its words and its padding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze.engine.tokens.features import Features
from mllm_squeeze.engine.tokens.spans import find_layout
from mllm_squeeze.errors import SqueezeWarning, UnsupportedInputError
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.upstream import masks
from mllm_squeeze.upstream.calls import TextCall
from mllm_squeeze.upstream.prompts import MODALITIES, PromptCall


def features_of(prompted: PromptCall, encoded: Mapping[str, Features], ids: Mapping[str, int]) -> dict[str, Features]:
    """Return what was encoded for this pass; what is encoded without a feature method is told by its inputs.

    prompted: call of the inner model. encoded: what its encoders gave, by modality. ids: of placeholders.
    """
    found = {modality: features.without(prompted.left(modality)) for modality, features in encoded.items()}
    for modality in MODALITIES:
        if modality in ids and modality not in found and prompted.brings(modality):
            found[modality] = Features(modality, None)
    return found


def layout_of(
    prompted: PromptCall,
    features: Mapping[str, Features],
    parts: ModelParts,
    call: TextCall,
    past: int,
    prompt: int | None,
) -> TokenLayout:
    """Return the layout of a pass.

    prompted: call of the inner model. call: of the text model. past: tokens seen before. prompt: length of the prompt
    that generate() was called with, None outside of it; what lies behind it are guesses of assisted decoding.
    """
    width = call.width
    ids = _ids(parts, prompted)
    real = real_tokens(prompted.mask, past, width)
    ids = ids[:, -width:]
    # A generate() of its own expands its rows for beams behind our back.
    ids = ids.repeat_interleave(call.batch // ids.shape[0], dim=0)
    real = None if real is None else real.repeat_interleave(ids.shape[0] // real.shape[0], dim=0)
    drafts = 0 if prompt is None else max(past + width - prompt, 0)
    return find_layout(ids, real, features, parts.ids, parts.row.grouped, prompted.token_types, drafts)


def prompt_ids(prompted: PromptCall, layout: TokenLayout) -> Tensor | None:
    """Return the ids (B, T) of a pass, None where only embeddings were given; see `layout_of`."""
    if prompted.ids is None:
        return None
    ids = prompted.ids[:, -layout.length :]
    return ids.repeat_interleave(layout.batch // ids.shape[0], dim=0)


def words_behind_pictures(
    parts: ModelParts, call: TextCall, prompted: PromptCall, prompt: int | None
) -> tuple[Tensor, Tensor]:
    """Return the embeddings (B, T, D) of a prompt, and bool (B, T), its words behind the first picture.

    call: of the text model. prompted: of the inner model. prompt: as for `layout_of`.
    """
    embeddings = call.embeddings
    if embeddings is None:
        table: Any = parts.decoder
        embeddings = table.embed_tokens(call.ids)
    ids = call.ids if prompted.ids is None else prompted.ids
    if ids is None:
        ids = _ids_from_embeddings(parts, embeddings)
    width = embeddings.shape[1]
    picture = ids[:, -width:] == parts.ids["image"]
    mask = prompted.mask
    real = mask[:, -width:].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else torch.ones_like(picture)
    if prompt is not None:
        real = real & (torch.arange(width, device=real.device) < prompt)
    behind = picture.cumsum(1) > 0
    return embeddings, (real & behind & ~picture).to(embeddings.device)


def warn_no_image() -> None:
    """Say that a prompt holds nothing that could be cut."""
    warnings.warn(
        "This prompt holds no image, video or audio that the handle saw being encoded; nothing was cut.",
        SqueezeWarning,
        stacklevel=2,
    )


def real_tokens(mask: Any, past: int, width: int) -> Tensor | None:
    """Return bool (B, T), False for padding; None where no token is said to be padding.

    mask: what the inner model got: 2-D (B, tokens seen), or 4-D (B, 1, T, K), as generate() makes them for caches that
    can be compiled. In a 4-D mask a real token sees itself.
    """
    # What cannot be read here is refused where it would have to be shortened.
    if masks.form(mask) not in ("keys", "square"):
        return None
    opened = masks.is_open(mask)
    opened = opened[:, None].expand(-1, width, -1) if opened.ndim == 2 else opened[:, 0]
    if opened.shape[-1] < past + width:
        past = opened.shape[-1] - width
    return opened[:, :, past : past + width].diagonal(dim1=1, dim2=2)


def _ids(parts: ModelParts, call: PromptCall) -> Tensor:
    if call.ids is not None:
        return call.ids
    if call.embeddings is None:
        raise UnsupportedInputError(
            f"The prompt has neither ids nor embeddings that could be found; it came with "
            f"{', '.join(call.inputs) or 'nothing'}."
        )
    return _ids_from_embeddings(parts, call.embeddings)


def _ids_from_embeddings(parts: ModelParts, embeddings: Tensor) -> Tensor:
    """Return ids that tell placeholders from text, by their embedding, as the library itself does."""
    table: Any = parts.base
    ids = torch.full(embeddings.shape[:2], -1, dtype=torch.long, device=embeddings.device)
    for token in set(parts.ids.values()):
        vector = table.get_input_embeddings()(torch.tensor(token, device=embeddings.device))
        ids = torch.where((embeddings == vector).all(-1), token, ids)
    return ids
