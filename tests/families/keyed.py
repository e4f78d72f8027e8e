"""The proof where visual tokens are keys that are attended to from outside: the dense model with the others closed.

Imports no engine: what is kept is told by `handle.cuts`, the masks are closed by hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import matrix
import oracle
import tiny


def reduces_keys(name: str) -> bool:
    """Say whether a method reduces keys in front of the LLM: it acts there alone and reads nothing but what it cuts."""
    way = matrix.method(name).way
    return way.places == ("before",) and not way.roads and "image" in matrix.method(name).modalities


# All of them; and one for each way, with whether it merges.
FIT = tuple(filter(reduces_keys, matrix.ALL))
METHODS = {name: matrix.method(name).merges for name in matrix.WAYS if name in FIT}


def width(inputs: tiny.Inputs) -> int:
    """Return the dense keys of a row of tiny Mllama: two tiles of 17 to a picture."""
    return inputs["pixel_values"].shape[1] * 34


def open_columns(kept: Sequence[Tensor], width: int, rows: int) -> Tensor:
    """Return bool (rows, width), True for keys that are kept; beams repeat each row."""
    out = torch.zeros(len(kept), width, dtype=torch.bool)
    for row, columns in enumerate(kept):
        out[row, columns] = True
    return out.repeat_interleave(rows // len(kept), 0)


def close(mask: Tensor | None, rows: Tensor | None, open_: Tensor, tokens: int) -> tuple[Tensor, Tensor | None]:
    """Close keys in a mask (B, 1, T, K); open_: bool (B, K). A word that sees no picture any more is marked as such."""
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(len(open_), 1, tokens, open_.shape[1]) if mask is None else mask
    allowed = (mask == 0) & open_[:, None, None]
    blind = ~allowed.any(-1, keepdim=True)
    allowed = torch.where(blind, open_[:, None, None], allowed)
    return torch.where(allowed, 0.0, lowest), None if rows is None else rows * ~blind


@contextmanager
def masked_text(model: Any, kept: Sequence[Tensor], width: int, merged: Tensor | None = None) -> Iterator[None]:
    """Make the dense text model attend to these keys only, in every pass.

    kept: columns per row of the prompt. width: dense keys. merged: (B, K, D), states in place of the projector's.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs.get("inputs_embeds")
        batch, tokens = (kwargs["input_ids"] if given is None else given).shape[:2]
        open_ = open_columns(kept, width, batch)
        mask, rows = close(kwargs["cross_attention_mask"], kwargs["full_text_row_masked_out_mask"], open_, tokens)
        new = {**kwargs, "cross_attention_mask": mask, "full_text_row_masked_out_mask": rows}
        states = kwargs.get("cross_attention_states")
        if states is not None and merged is not None:
            new["cross_attention_states"] = merged.repeat_interleave(batch // len(merged), 0).view_as(states)
        return args, new

    handle = oracle.text_model(model).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def attended(model: Any) -> Iterator[list[Tensor]]:
    """Collect the states from which the first cross-attention layer makes its keys."""
    text = oracle.text_model(model)
    seen: list[Tensor] = []
    attention = text.layers[text.config.cross_attention_layers[0]].cross_attn
    handle = attention.k_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        yield seen
    finally:
        handle.remove()


def spread(short: Tensor, kept: Sequence[Tensor], dense: Tensor) -> Tensor:
    """Return dense states (B, K, D) with short ones (B, M, D), padded on the left, in the places they were kept at."""
    out = dense.reshape(len(kept), -1, dense.shape[-1]).clone()
    for row, columns in enumerate(kept):
        out[row, columns] = short[row, short.shape[1] - len(columns) :]
    return out


@contextmanager
def masked_queries(model: Any, kept: Sequence[Tensor], merged: Tensor | None = None) -> Iterator[None]:
    """Make the dense Q-Former attend to these image features only; merged: (B, K, D) in place of the encoder's."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states, mask = kwargs["encoder_hidden_states"], kwargs["encoder_attention_mask"]
        open_ = open_columns(kept, states.shape[1], len(states))
        new = {**kwargs, "encoder_attention_mask": mask * open_}
        return args, new if merged is None else {**new, "encoder_hidden_states": merged}

    handle = model.qformer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
