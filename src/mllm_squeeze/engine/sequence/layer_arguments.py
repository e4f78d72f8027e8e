"""What a decoder layer is given in one pass: rotary tables, masks and positions of the tokens that it sees."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mllm_squeeze.engine.kv import ask as kv
from mllm_squeeze.engine.kv.entries import KeptEntries
from mllm_squeeze.engine.sequence.memo import Memo
from mllm_squeeze.engine.sequence.shorten import (
    Rows,
    gather_positions,
    gather_rope,
    gather_rows,
    is_flash,
    shorten_mask,
    shorten_padding,
)
from mllm_squeeze.engine.sequence.survivors import Left, Survivors
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream.calls import LayerCall


class LayerArguments:
    """Makes the arguments of each layer from those of the full sequence, once for all layers that see the same."""

    def __init__(self, survivors: Survivors) -> None:
        self._survivors = survivors
        self._parts = survivors.parts
        self._made = Memo()
        # Bool (B, P'): held entries that the layers behind a decode step's choice do not see, None where all are seen.
        self._closed: Tensor | None = None

    def forget(self) -> None:
        """Let go of what was made for other layers: the next ones see other tokens."""
        self._made.clear()

    def close(self, closed: Tensor) -> None:
        """Take held entries (bool (B, P')) out of the sight of the layers to come."""
        self._closed = closed
        self.forget()

    @marked("shorten")
    def shorten(self, layer: int, hidden: Tensor, call: LayerCall) -> LayerCall:
        """Return the call of a layer that sees only survivors, and announce them to its KV layer.

        hidden: (B, M, D) of the survivors; those of the call are left to the caller.
        """
        left, cache, holder = self._survivors.left, call.cache, self._holder(layer)
        entries = kv.kept_entries(cache, holder)
        if left is not None:
            queries: Tensor | None = left.index
        elif entries is not None:
            queries = None if call.mask is None and self._sees_all(entries) else self._all_queries(entries)
        else:
            return call
        self._refuse_window(layer)
        placed = self._placed(layer, hidden, call, entries)
        if queries is None:
            kv.serve(cache, layer)
            return placed
        rows = self._rows_for(layer, cache, queries, entries, hidden.shape[1])
        if left is not None and cache is not None and holder == layer:
            kv.announce(
                cache, layer, self._made.once("entries", rows, make=lambda: self._announced(left, rows, entries))
            )
        elif cache is not None:
            kv.serve(cache, layer)
        return placed.replace(mask=self._mask(layer, call.mask, rows))

    def given(self, layer: int, hidden: Tensor, call: LayerCall) -> LayerCall:
        """Return the call of a layer with rotary tables and positions of the survivors; the mask is left."""
        return self._placed(layer, hidden, call, kv.kept_entries(call.cache, self._holder(layer)))

    def mask_now(self, layer: int, hidden: Tensor, call: LayerCall) -> Any:
        """Return the mask of a layer over the keys it would see if it ran now, on hidden (B, M, D)."""
        left, holder = self._survivors.left, self._holder(layer)
        entries = kv.kept_entries(call.cache, holder)
        if left is not None:
            queries = left.index
        elif entries is not None:
            queries = self._all_queries(entries)
        else:
            return call.mask
        return self._mask(layer, call.mask, self._rows_for(layer, call.cache, queries, entries, hidden.shape[1]))

    def entries_before(self, layer: int, call: LayerCall) -> tuple[Tensor, Tensor] | None:
        """Return keys and values (B, Hkv, n, d) that a layer holds of earlier passes, None where it holds none."""
        held = kv.held_entries(call.cache, layer, self._survivors.past)
        if not held:
            return None
        found: Any = kv.layer_at(call.cache, layer)
        return found.keys[:, :, :held], found.values[:, :, :held]

    def per_token(self, given: Any) -> Any:
        """Take the survivors' rows of another argument with one row per token, such as Gemma's per-layer inputs."""
        index, width = self._survivors.index, self._survivors.width
        if index is None:
            return given
        if isinstance(given, (tuple, list)):
            return gather_rope(given, index, width)
        if not isinstance(given, Tensor) or given.ndim not in (2, 3) or given.shape[1] != width:
            return given
        if given.ndim == 2:
            return gather_positions(given, index)
        return gather_rows(given, index)

    def _holder(self, layer: int) -> int:
        """Return the layer whose KV layer a layer reads: itself, or the one that it borrows keys and values from."""
        return self._parts.kv_sources.get(layer, layer)

    def _sees_all(self, entries: KeptEntries) -> bool:
        """True where every row holds the same number of entries and sees them all, so that there is no mask to fix."""
        return self._closed is None and entries.valid is None

    def _refuse_window(self, layer: int) -> None:
        window, seen = self._parts.window(layer), self._survivors.past + self._survivors.width
        if window is not None and is_flash(self._survivors.implementation) and seen > window:
            raise UnsupportedInputError(
                f"Layer {layer} sees a sliding window of {window} tokens, and {seen} were seen. FlashAttention counts "
                "the entries that are left, not the tokens that were; load the model with "
                "attn_implementation='sdpa'."
            )

    # Queries, keys and masks

    def _all_queries(self, entries: KeptEntries) -> Tensor:
        columns, width = entries.columns, self._survivors.width
        return torch.arange(width, device=columns.device).expand(columns.shape[0], -1)

    def _rows_for(self, layer: int, cache: Any, queries: Tensor, entries: KeptEntries | None, width: int) -> Rows:
        """Return the queries and keys that a layer sees if it runs on so many tokens."""
        holder = self._holder(layer)
        held = kv.held_entries(cache, holder, self._survivors.past)
        if holder == layer:
            return self._own_rows(layer, cache, queries, entries, held)
        return self._borrowed_rows(queries, entries, held, width)

    def _borrowed_rows(self, queries: Tensor, entries: KeptEntries | None, held: int, width: int) -> Rows:
        """Return the rows of a layer that borrows keys and values, which hold the tokens of this pass already.

        width: tokens that it runs on.
        """
        now = self._survivors
        valid = now.valid
        if entries is None or not held:
            keys, key_valid = queries + now.past, valid
        else:
            keys, key_valid = entries.extended(held)
        # Where only the last logits are wanted, such layers run on the last tokens only.
        queries = queries[:, queries.shape[1] - width :]
        query_valid = None if valid is None else valid[:, valid.shape[1] - width :]
        key_valid = self._seen(keys, key_valid)
        return Rows(queries, keys.to(queries.device), query_valid, key_valid, now.past, now.width)

    def _own_rows(self, layer: int, cache: Any, queries: Tensor, entries: KeptEntries | None, held: int) -> Rows:
        """Return the queries and keys that a layer sees in this pass; the same object for layers that see the same."""
        held = held if self._parts.has_entries(layer) else 0
        whole = kv.whole_length(cache, layer)
        make = functools.partial(self._rows, queries, entries, held, whole)
        rows: Rows = self._made.once("rows", entries, held, whole, make=make)
        return rows

    def _rows(self, queries: Tensor, entries: KeptEntries | None, held: int, whole: int | None) -> Rows:
        now, past = self._survivors, self._survivors.past
        parts = [self._held_keys(entries, held, queries), (queries + past, now.valid)]
        seen = past + now.width
        if whole is not None:
            coming = torch.arange(seen, whole, device=queries.device)
            parts.append((coming.expand(queries.shape[0], -1), None))
        keys, key_valid = _joined(parts)
        ahead = 0 if whole is None else whole - seen
        return Rows(queries, keys, now.valid, self._seen(keys, key_valid), past, now.width, ahead)

    def _held_keys(self, entries: KeptEntries | None, held: int, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        past = self._survivors.past
        if entries is None or not held:
            return torch.arange(past - held, past, device=queries.device).expand(queries.shape[0], -1), None
        columns, valid = entries.extended(held)
        return columns.to(queries.device), None if valid is None else valid.to(queries.device)

    def _seen(self, keys: Tensor, valid: Tensor | None) -> Tensor | None:
        """Return which keys (B, P) are seen: the valid ones that a decode step did not close."""
        if self._closed is None:
            return valid
        seen = ~functional.pad(self._closed, (0, keys.shape[1] - self._closed.shape[1]))
        return seen if valid is None else valid & seen

    def _mask(self, layer: int, mask: Any, rows: Rows) -> Tensor | None:
        if not self._parts.has_entries(layer):
            # Layers without entries read which tokens are real, not who may see whom.
            return self._made.once("real", mask, rows, make=lambda: shorten_padding(mask, rows))
        causal = self._parts.is_causal(layer)
        make = functools.partial(shorten_mask, mask, rows, self._survivors.implementation, causal)
        found: Tensor | None = self._made.once("mask", mask, rows, causal, make=make)
        return found

    def _announced(self, left: Left, rows: Rows, entries: KeptEntries | None) -> KeptEntries:
        """Return what a KV layer will hold once the keys of what is left are written."""
        now = self._survivors
        # The last column is never padding when rows are padded on the left.
        shift = left.shift[:, -1] if entries is None else left.shift[:, -1] + entries.shift.to(rows.keys.device)
        seen = now.past + now.width
        filled = rows.keys.shape[1] - rows.ahead
        columns, valid = rows.keys[:, :filled], None if rows.key_valid is None else rows.key_valid[:, :filled]
        visual = None if now.plan.decode is None else _visual(left, filled, entries)
        return KeptEntries(columns, valid, seen, shift, left.tail, visual, now.renumbers(entries))

    # Positions

    def _placed(self, layer: int, hidden: Tensor, call: LayerCall, entries: KeptEntries | None) -> LayerCall:
        """Return a call with rotary tables and positions of the survivors; entries: of the KV layer that it reads."""
        left = self._survivors.left
        if left is None and entries is None:
            return call
        if self._survivors.renumbers(entries):
            return self._renumbered(layer, call, hidden, entries)
        return call if left is None else self._gathered(call, left.index)

    def _gathered(self, call: LayerCall, index: Tensor) -> LayerCall:
        """Take the survivors' rows of rotary tables and positions."""
        rope, positions, width = call.rope, call.positions, self._survivors.width
        if rope is not None:
            rope = self._made.once("rope", rope, make=lambda: gather_rope(call.rope, index, width))
        if isinstance(positions, Tensor) and positions.shape[-1] == width:
            # Flash attention reads gaps between positions as packed sequences, so it must not see them.
            positions = (
                None
                if is_flash(self._survivors.implementation)
                else self._made.once("positions", positions, make=lambda: gather_positions(call.positions, index))
            )
        return call.replace(rope=rope, positions=positions)

    def _renumbered(self, layer: int, call: LayerCall, hidden: Tensor, entries: KeptEntries | None) -> LayerCall:
        """Give survivors consecutive positions, and new tokens the ones behind them."""
        given = call.positions
        if given is None:
            raise UnsupportedInputError(
                "The text model passes no position_ids to its layers, so survivors cannot be renumbered. Use "
                "positions='keep' in the recipe."
            )
        positions = self._made.once("repack", given, entries, make=lambda: self._new_positions(given, hidden, entries))
        # A layer that is given no tables has no positions.
        rope = call.rope
        if rope is not None:
            kind = self._parts.rope_kind(layer)
            rope = self._made.once("tables", positions, kind, make=lambda: self._parts.rotate(layer, hidden, positions))
        return call.replace(positions=positions, rope=rope)

    def _new_positions(self, positions: Tensor, hidden: Tensor, entries: KeptEntries | None) -> Tensor:
        left = self._survivors.left
        positions = positions.expand(hidden.shape[0], -1)
        if left is not None:
            positions = positions.gather(1, left.index.to(positions.device)) - left.shift.to(positions.device)
        if entries is not None:
            positions = positions - entries.shift.to(positions.device)[:, None]
        return positions.clamp(min=0)


def _joined(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Join columns and validity side by side; None stands for all valid, and comes out where all parts are."""
    columns = torch.cat([column for column, _ in parts], dim=1)
    if all(valid is None for _, valid in parts):
        return columns, None
    every = [torch.ones_like(column, dtype=torch.bool) if valid is None else valid for column, valid in parts]
    return columns, torch.cat(every, dim=1)


def _visual(left: Left, filled: int, entries: KeptEntries | None) -> Tensor:
    """Return bool (B, P): which entries of a KV layer will be visual."""
    new = left.visual if left.valid is None else left.visual & left.valid
    before = new.new_zeros(new.shape[0], filled - new.shape[1])
    if entries is not None and entries.visual is not None:
        before[:, : entries.visual.shape[1]] = entries.visual
    return torch.cat([before, new], dim=1)
