"""What a decoder layer is given in one pass: rotary tables, masks and positions of the tokens that it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mllm_squeeze.engine.kv import ask as kv
from mllm_squeeze.engine.kv.layers import KeptEntries
from mllm_squeeze.engine.sequence.shorten import (
    Rows,
    gather_positions,
    gather_rope,
    gather_rows,
    is_flash,
    shorten_mask,
    shorten_padding,
)
from mllm_squeeze.engine.sequence.survivors import Survivors
from mllm_squeeze.engine.timing import marked
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream.calls import LayerCall


class LayerArguments:
    """Makes the arguments of each layer from those of the full sequence, once for all layers that see the same."""

    def __init__(self, survivors: Survivors) -> None:
        self._survivors = survivors
        self._parts = survivors.parts
        self._made: dict[Any, Any] = {}
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
        cache = call.cache
        source = self._parts.kv_sources.get(layer)
        entries = kv.kept_entries(cache, layer if source is None else source)
        if self._survivors.index is None and entries is None:
            return call
        self._refuse_window(layer)
        if call.mask is None and self._is_plain_decode(entries):
            kv.serve(cache, layer)
            return self.given(layer, hidden, call) if self._survivors.renumbers(entries) else call
        new = self.given(layer, hidden, call)
        rows, entries = self._rows_of(layer, cache, hidden.shape[1])
        if self._survivors.index is not None and cache is not None and source is None:
            announced = self._once(("entries", id(rows)), lambda: self._announced(rows, entries))
            kv.announce(cache, layer, announced)
        elif cache is not None:
            kv.serve(cache, layer)
        return new.replace(mask=self._mask(layer, call.mask, rows))

    def given(self, layer: int, hidden: Tensor, call: LayerCall) -> LayerCall:
        """Return the call of a layer with rotary tables and positions of the survivors; the mask is left."""
        entries = kv.kept_entries(call.cache, layer)
        if self._survivors.index is None and entries is None:
            return call
        renumbers = self._survivors.renumbers(entries)
        return self._renumbered(layer, call, hidden, entries) if renumbers else self._gathered(call)

    def mask_now(self, layer: int, hidden: Tensor, call: LayerCall) -> Any:
        """Return the mask of a layer over the keys it would see if it ran now, on hidden (B, M, D)."""
        source = self._parts.kv_sources.get(layer)
        if self._survivors.index is None and kv.kept_entries(call.cache, layer if source is None else source) is None:
            return call.mask
        rows, _ = self._rows_of(layer, call.cache, hidden.shape[1])
        return self._mask(layer, call.mask, rows)

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
        if not isinstance(given, Tensor) or given.ndim != 3 or given.shape[1] != width:
            return given
        return gather_rows(given, index)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _is_plain_decode(self, entries: KeptEntries | None) -> bool:
        """True where every row holds the same number of entries and sees them all, so that there is no mask to fix."""
        return self._survivors.index is None and self._closed is None and entries is not None and entries.valid is None

    def _refuse_window(self, layer: int) -> None:
        window, seen = self._parts.window(layer), self._survivors.past + self._survivors.width
        if window is not None and is_flash(self._survivors.implementation) and seen > window:
            raise UnsupportedInputError(
                f"Layer {layer} sees a sliding window of {window} tokens, and {seen} were seen. FlashAttention counts "
                "the entries that are left, not the tokens that were; load the model with "
                "attn_implementation='sdpa'."
            )

    # Queries, keys and masks

    def _rows_of(self, layer: int, cache: Any, width: int) -> tuple[Rows, KeptEntries | None]:
        """Return the queries and keys that a layer sees in this pass; width: tokens it runs on."""
        source = self._parts.kv_sources.get(layer)
        holder = layer if source is None else source
        entries = kv.kept_entries(cache, holder)
        held = kv.held_entries(cache, holder, self._survivors.past)
        if source is not None:
            return self._borrowed(entries, held, width), entries
        if not self._parts.has_entries(layer):
            held = 0
        whole = kv.whole_length(cache, holder)
        rows: Rows = self._once(("rows", id(entries), held, whole), lambda: self._rows(entries, held, whole))
        return rows, entries

    def _borrowed(self, entries: KeptEntries | None, held: int, width: int) -> Rows:
        """Return the rows of a layer that borrows keys and values, which hold the tokens of this pass already."""
        now = self._survivors
        index, valid = self._index_now(entries), now.valid
        if entries is None or not held:
            keys, key_valid = index + now.past, valid
        else:
            keys, key_valid = entries.extended(held)
        # Where only the last logits are wanted, such layers run on the last tokens only.
        index = index[:, index.shape[1] - width :]
        query_valid = None if valid is None else valid[:, valid.shape[1] - width :]
        key_valid = self._seen(keys, key_valid)
        return Rows(index, keys.to(index.device), query_valid, key_valid, now.past, now.width)

    def _rows(self, entries: KeptEntries | None, held: int, whole: int | None) -> Rows:
        now = self._survivors
        index, past = self._index_now(entries), now.past
        parts = [self._held_keys(entries, held, index), (index + past, now.valid)]
        seen = past + now.width
        if whole is not None:
            coming = torch.arange(seen, whole, device=index.device)
            parts.append((coming.expand(index.shape[0], -1), None))
        keys, key_valid = _joined(parts)
        ahead = 0 if whole is None else whole - seen
        return Rows(index, keys, now.valid, self._seen(keys, key_valid), past, now.width, ahead)

    def _held_keys(self, entries: KeptEntries | None, held: int, index: Tensor) -> tuple[Tensor, Tensor | None]:
        past = self._survivors.past
        if entries is None or not held:
            return torch.arange(past - held, past, device=index.device).expand(index.shape[0], -1), None
        columns, valid = entries.extended(held)
        return columns.to(index.device), None if valid is None else valid.to(index.device)

    def _seen(self, keys: Tensor, valid: Tensor | None) -> Tensor | None:
        """Return which keys (B, P) are seen: the valid ones that a decode step did not close."""
        if self._closed is None:
            return valid
        seen = ~functional.pad(self._closed, (0, keys.shape[1] - self._closed.shape[1]))
        return seen if valid is None else valid & seen

    def _index_now(self, entries: KeptEntries | None) -> Tensor:
        if self._survivors.index is not None:
            return self._survivors.index
        assert entries is not None
        columns = entries.columns
        return torch.arange(self._survivors.width, device=columns.device).expand(columns.shape[0], -1)

    def _mask(self, layer: int, mask: Any, rows: Rows) -> Tensor | None:
        if not self._parts.has_entries(layer):
            # Layers without entries read which tokens are real, not who may see whom.
            return self._once(("real", id(mask), id(rows)), lambda: shorten_padding(mask, rows))
        causal = self._parts.is_causal(layer)
        found: Tensor | None = self._once(
            ("mask", id(mask), id(rows), causal),
            lambda: shorten_mask(mask, rows, self._survivors.implementation, causal),
        )
        return found

    def _announced(self, rows: Rows, entries: KeptEntries | None) -> KeptEntries:
        now = self._survivors
        assert now.shift is not None
        # The last column is never padding when rows are padded on the left.
        shift = now.shift[:, -1] if entries is None else now.shift[:, -1] + entries.shift.to(rows.keys.device)
        seen = now.past + now.width
        filled = rows.keys.shape[1] - rows.ahead
        columns, valid = rows.keys[:, :filled], None if rows.key_valid is None else rows.key_valid[:, :filled]
        visual = None if now.plan.decode is None else self._visual(filled, entries)
        return KeptEntries(columns, valid, seen, shift, now.tail, visual, now.renumbers(entries))

    def _visual(self, filled: int, entries: KeptEntries | None) -> Tensor:
        """Return bool (B, P): which entries of a KV layer will be visual."""
        now = self._survivors
        new = now.visual if now.valid is None else now.visual & now.valid
        before = new.new_zeros(new.shape[0], filled - new.shape[1])
        if entries is not None and entries.visual is not None:
            before[:, : entries.visual.shape[1]] = entries.visual
        return torch.cat([before, new], dim=1)

    # Positions

    def _gathered(self, call: LayerCall) -> LayerCall:
        """Take the survivors' rows of rotary tables and positions."""
        index, width = self._survivors.index, self._survivors.width
        if index is None:
            return call
        rope, positions = call.rope, call.positions
        if rope is not None:
            rope = self._once(("rope", id(rope)), lambda: gather_rope(call.rope, index, width))
        if isinstance(positions, Tensor) and positions.shape[-1] == width:
            # Flash attention reads gaps between positions as packed sequences, so it must not see them.
            positions = (
                None
                if is_flash(self._survivors.implementation)
                else self._once(("positions", id(positions)), lambda: gather_positions(call.positions, index))
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
        positions, rope = self._once(
            ("repack", id(given), id(entries), self._parts.rope_kind(layer)),
            lambda: self._new_positions(layer, given, hidden, entries),
        )
        return call.replace(positions=positions, rope=rope)

    def _new_positions(
        self, layer: int, positions: Tensor, hidden: Tensor, entries: KeptEntries | None
    ) -> tuple[Tensor, Any]:
        index, shift = self._survivors.index, self._survivors.shift
        positions = positions.expand(hidden.shape[0], -1)
        if index is not None and shift is not None:
            positions = positions.gather(1, index.to(positions.device)) - shift.to(positions.device)
        if entries is not None:
            positions = positions - entries.shift.to(positions.device)[:, None]
        positions = positions.clamp(min=0)
        return positions, self._parts.rotate(layer, hidden, positions)


def _joined(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Join columns and validity side by side; None stands for all valid, and comes out where all parts are."""
    columns = torch.cat([column for column, _ in parts], dim=1)
    if all(valid is None for _, valid in parts):
        return columns, None
    every = [torch.ones_like(column, dtype=torch.bool) if valid is None else valid for column, valid in parts]
    return columns, torch.cat(every, dim=1)
