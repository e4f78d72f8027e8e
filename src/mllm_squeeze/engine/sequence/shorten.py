"""The one place that shortens what decoder layers are given: rotary tables, masks and positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze import ops
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream import masks
from mllm_squeeze.upstream.attention import is_flash, kind

__all__ = [
    "Rows",
    "gather_positions",
    "gather_rope",
    "gather_rows",
    "is_flash",
    "shorten_mask",
    "shorten_padding",
]


@dataclass(frozen=True)
class Rows:
    """The queries and keys of one layer call, in logical columns.

    queries: int64 (B, M), query columns of this call (0 is the first token of the call). keys: int64 (B, P), columns of
    all held entries, the new ones included, counted from the first token ever seen. query_valid, key_valid: bool or
    None. past: tokens seen before this call. width: tokens of this call before any cut. ahead: trailing keys that are
    slots for tokens to come, in a cache of fixed size; masks have columns for them too.
    """

    queries: Tensor
    keys: Tensor
    query_valid: Tensor | None
    key_valid: Tensor | None
    past: int
    width: int
    ahead: int = 0


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Take rows (B, M) of a (B or 1, T, D) tensor."""
    values = values.expand(index.shape[0], -1, -1)
    return values.gather(1, index.to(values.device).unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def gather_positions(positions: Tensor, index: Tensor) -> Tensor:
    """Take columns (B, M) of position ids (B or 1, T), or of several axes of them (A, B, T)."""
    index = index.to(positions.device)
    if positions.ndim == 3:
        return torch.stack([gather_positions(axis, index) for axis in positions])
    return positions.expand(index.shape[0], -1).gather(1, index)


def gather_rope(tables: Any, index: Tensor, width: int) -> Any:
    """Take rows of rotary tables: (B or 1, T, D) or (3, B, T, D) each, alone, as (cos, sin) or by layer type."""
    if tables is None:
        return None
    if isinstance(tables, dict):
        return {name: gather_rope(table, index, width) for name, table in tables.items()}
    if isinstance(tables, (tuple, list)):
        if all(isinstance(t, Tensor) and t.is_floating_point() and t.shape[-2] == width for t in tables):
            return type(tables)(ops.gather_together(index.to(tables[0].device), tables))
        return type(tables)(gather_rope(table, index, width) for table in tables)
    if tables.shape[-2] != width:
        return tables
    if tables.ndim == 4:
        return torch.stack([gather_rows(axis, index) for axis in tables])
    return gather_rows(tables, index)


def shorten_mask(mask: Any, rows: Rows, implementation: str, causal: bool = True) -> Tensor | None:
    """Return the attention mask of a layer that sees only some rows and columns.

    mask: what the text model made for the full sequence: None, bool or float (B or 1, H, T, K), or the 2-D key mask
    (B, K) of flash attention. causal: whether None means that later tokens are closed, or that none is. Returns None
    where that says it of the short sequence too, else the same kind.

    Raises:
        UnsupportedInputError: a mask of another form (flex attention), or none under an implementation of which nothing
        is known that could say what None does not.
    """
    form = masks.form(mask)
    if form == "none":
        return _mask_from_nothing(rows, implementation, causal)
    if form == "keys":
        return _shorten_keys(mask, rows)
    if form == "square":
        return _shorten_square(mask, rows)
    raise UnsupportedInputError(
        f"Attention masks of type {type(mask).__name__} ({implementation}) cannot be shortened. Load the model "
        "with attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
    )


def shorten_padding(mask: Any, rows: Rows) -> Tensor | None:
    """Return the padding mask (B, M) of a layer that mixes tokens without attention, None where all tokens are real."""
    if mask is None:
        return rows.query_valid
    if masks.form(mask) != "keys":
        raise UnsupportedInputError(
            f"A layer without attention got a mask of type {type(mask).__name__}; expected 2-D."
        )
    return _shorten_keys(mask, rows)


def _mask_from_nothing(rows: Rows, implementation: str, causal: bool) -> Tensor | None:
    length, filled = rows.queries.shape[1], rows.keys.shape[1] - rows.ahead
    plain = rows.key_valid is None and rows.query_valid is None
    of = kind(implementation)
    if of == "flash":
        return None if plain else rows.key_valid
    # Eager attention adds what it is given and closes nothing by itself.
    causal = causal and of != "eager"
    # SDPA reads no mask as: one query sees all keys; several see the first keys up to their own, if they are causal.
    if plain and (rows.ahead == 0 if length == 1 or not causal else length == filled):
        return None
    if of not in ("sdpa", "eager"):
        raise UnsupportedInputError(
            f"The layers get no attention mask under '{implementation}', and the short sequence needs one, whose form "
            "under this implementation is not known. Load the model with attn_implementation='sdpa', or register the "
            "function that makes its masks: transformers.AttentionMaskInterface.register."
        )
    # Slots for tokens to come are closed to all.
    latest = rows.queries if causal else torch.full_like(rows.queries, rows.width - 1)
    allowed = rows.keys[:, None, :] <= latest[:, :, None] + rows.past
    mask = _close_invalid(allowed[:, None], rows)
    if of == "sdpa":
        return mask
    # Eager attention adds its mask to the logits.
    return masks.close(torch.zeros(mask.shape, device=mask.device), ~mask)


def _shorten_keys(mask: Tensor, rows: Rows) -> Tensor:
    columns, inside = _columns(rows, mask.shape[-1])
    short = masks.is_open(mask.expand(rows.keys.shape[0], -1).gather(1, columns))
    return short & inside if rows.key_valid is None else short & inside & rows.key_valid


def _shorten_square(mask: Tensor, rows: Rows) -> Tensor:
    batch = rows.keys.shape[0]
    columns, inside = _columns(rows, mask.shape[-1])
    if columns.device != mask.device:
        columns, inside = columns.to(mask.device), inside.to(mask.device)
    queries = rows.queries.to(mask.device)
    if mask.shape[-2] != rows.width:
        # One row for all queries, or rows that the model took already.
        queries = torch.arange(mask.shape[-2], device=mask.device).expand(batch, -1)
    mask = mask.expand(batch, -1, -1, -1)
    pick = torch.arange(batch, device=mask.device)[:, None, None]
    short = mask[pick, :, queries[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return _close_invalid(masks.close(short, ~inside[:, None, None, :]), rows)


def _columns(rows: Rows, width: int) -> tuple[Tensor, Tensor]:
    """Return mask columns of the held entries, and which of them the mask reaches (a sliding one starts later)."""
    columns = rows.keys - (rows.past + rows.width + rows.ahead - width)
    return columns.clamp(min=0), columns >= 0


def _close_invalid(mask: Tensor, rows: Rows) -> Tensor:
    """Close padded keys; let padded queries see themselves, since a row without any key would be NaN."""
    if rows.key_valid is not None:
        mask = masks.close(mask, ~rows.key_valid.to(mask.device)[:, None, None, :])
    if rows.query_valid is not None:
        queries, keys = rows.queries.shape[1], rows.keys.shape[1]
        slot = torch.arange(queries, device=mask.device) + (keys - rows.ahead - queries)
        itself = torch.arange(keys, device=mask.device) == slot[:, None]
        lonely = itself[None, None] & ~rows.query_valid.to(mask.device)[:, None, :, None]
        mask = masks.open_to(mask, lonely)
    return mask
