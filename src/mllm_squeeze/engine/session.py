"""One pass through the decoder: what is cut where, and what each layer is given because of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_squeeze import ops
from mllm_squeeze.engine import cache as kv
from mllm_squeeze.engine.marks import marked
from mllm_squeeze.engine.plan import Plan
from mllm_squeeze.engine.sequence import (
    Rows,
    gather_positions,
    gather_rope,
    gather_rows,
    is_flash,
    shorten_mask,
    shorten_padding,
)
from mllm_squeeze.engine.spans import Features, SpanTable, first_table
from mllm_squeeze.engine.trace import Cut, StageTrace
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.family.handlers.inner_features import InnerFeatures
from mllm_squeeze.family.structure import ModelParts
from mllm_squeeze.layout import TokenLayout
from mllm_squeeze.reducers.base import Reduction


class Session:
    """State of one decoder pass; it lives as long as the pass, what decode needs lives with the cache.

    width: tokens of this pass before any cut. past: tokens seen before. layout: None where there is nothing to cut.
    """

    def __init__(
        self,
        plan: Plan,
        parts: ModelParts,
        layout: TokenLayout | None,
        features: Mapping[str, Features],
        width: int,
        past: int,
    ) -> None:
        self.plan, self.parts, self.layout, self.features = plan, parts, layout, features
        self.width, self.past = width, past
        self.cuts: list[Cut] = []
        self.traces: list[StageTrace] = []
        # Sequence length of each layer in this pass, and the entries it held before.
        self.lengths: dict[int, int] = {}
        self.held: dict[int, int] = {}
        # What taps of this pass should read, by attention module, and what they read, by cut.
        self.listeners: dict[nn.Module, Any] = {}
        self.read: dict[tuple[int, str], Tensor] = {}
        self.row_weights: dict[int, Tensor] = {}
        # Features that the text model would have added in front of inner layers, None in most families.
        self.inner: InnerFeatures | None = None
        self._memo: dict[Any, Any] = {}
        self._full: Tensor | None = None
        self.index: Tensor | None = None
        self.valid: Tensor | None = None
        self.shift: Tensor | None = None
        self.stage = 0
        # Bool (B, P'): held entries that the layers behind a decode step's choice do not see, None where all are seen.
        self.closed: Tensor | None = None
        if layout is not None:
            self.row_lengths = [int(n) for n in layout.real.sum(1)]

    @property
    def cutting(self) -> bool:
        """True in a prefill with visual tokens."""
        return self.layout is not None

    @property
    def repack(self) -> bool:
        """True where survivors of a new cut are renumbered."""
        parts = self.parts
        # Layers that borrow keys would see them at positions of two numberings.
        return self.plan.repack and not parts.mrope and not parts.kv_sources and parts.rotary is not None

    def _renumbers(self, entries: kv.KeptEntries | None) -> bool:
        """Say whether positions are renumbered; a cache goes on as it began, whatever is applied now."""
        return self.repack if entries is None else entries.repack

    @property
    def implementation(self) -> str:
        """Attention implementation of the text model."""
        return str(self.parts.text_config._attn_implementation)

    @marked("shorten")
    def prepare(self, device: torch.device) -> None:
        """Put the layout on the device: spans, text behind the first visual token, last token, padding."""
        layout = self.layout
        assert layout is not None
        self.table: SpanTable = first_table(layout, device)
        visual, real = layout.visual, layout.real
        columns = torch.arange(layout.length)
        behind = layout.prompt & ~visual & (columns > torch.tensor(layout.first_visual)[:, None])
        count = max(int(behind.sum(1).max()), 1)
        order = (~behind).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        self.text_place = order.to(device)
        self.text_mask = behind.gather(1, order).to(device)
        self.last_place = torch.tensor(layout.last, device=device)[:, None]
        self.real, self.visual = real.to(device), visual.to(device)
        padded = not bool(real.all())
        # Bool (B, M) where tokens are real now, None where all are.
        self.present = self.real if padded else None
        last_visual = (visual.long() * columns).amax(1)
        ends_real = bool(real[:, -1].all())
        self.tail = int((layout.length - 1 - last_visual).min()) if ends_real else 0

    # Cutting

    @marked("shorten")
    def advance(self, layer: int, hidden: Tensor, chosen: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Drop all visual tokens but the chosen ones.

        hidden: (B, M, D). chosen: bool (S, N) over the table of now. counts: tokens each span keeps, on the host.
        Returns hidden states (B, M', D), shorter rows padded on the left.
        """
        batch, length, _ = hidden.shape
        keep = self._keep_tokens(batch, length, chosen, hidden.device)
        for span, before, after in zip(self._layout.spans, self.table.current, counts, strict=True):
            self.row_lengths[span.sample] -= before - after
        width = max(self.row_lengths)
        order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, length - width :]
        pad = torch.tensor([width - n for n in self.row_lengths], device=hidden.device)[:, None]
        even = min(self.row_lengths) == width
        place = keep.cumsum(1) - 1 + pad

        was_there = self._was_there(batch, length, hidden.device)
        gone = (was_there & ~keep).cumsum(1)
        shift = gone if self.shift is None else self.shift + gone
        self._full = hidden if self.index is None else self._restored(hidden)
        self.index = order if self.index is None else self.index.gather(1, order)
        self.valid = None if even else torch.arange(width, device=hidden.device) >= pad
        self.present = self.valid
        self.visual = self.visual.gather(1, order)
        self.shift = shift.gather(1, order)
        rows = torch.arange(batch, device=hidden.device)[:, None]
        self.table = self.table.take(chosen, counts, place[self.table.sample[:, None], self.table.place])
        self.text_place = place[rows, self.text_place].clamp(min=0)
        self.last_place = place[rows, self.last_place]
        self.stage += 1
        self._memo.clear()
        self.cuts.append(Cut(layer, self.index, self.valid))
        return gather_rows(hidden, order)

    @property
    def _layout(self) -> TokenLayout:
        assert self.layout is not None
        return self.layout

    def _was_there(self, batch: int, length: int, device: torch.device) -> Tensor:
        if self.index is None:
            return self.real
        return self.valid if self.valid is not None else torch.ones(batch, length, dtype=torch.bool, device=device)

    def _keep_tokens(self, batch: int, length: int, chosen: Tensor, device: torch.device) -> Tensor:
        """Return bool (B, M): real text and the chosen visual tokens."""
        keep = self._was_there(batch, length, device).clone()
        table = self.table
        # Padding slots of a span write what its first token writes, to the same place.
        place = torch.where(table.mask, table.place, table.place[:, :1])
        value = torch.where(table.mask, chosen, chosen[:, :1])
        keep[table.sample[:, None], place] = value
        return keep

    def _restored(self, hidden: Tensor) -> Tensor:
        """Return the full-length states (B, T, D): survivors as they are now, the others as they were when cut."""
        assert self._full is not None
        assert self.index is not None
        full = self._full.to(hidden.device)
        index = self.index.to(hidden.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        if self.valid is not None:
            hidden = torch.where(self.valid.to(hidden.device).unsqueeze(-1), hidden, full.gather(1, index))
        return full.scatter(1, index, hidden)

    @marked("shorten")
    def restore(self, hidden: Tensor) -> Tensor:
        """Return the full-length output of the last layer; unchanged where nothing was cut."""
        if self.index is None or hidden.shape[1] != self.index.shape[1]:
            return hidden
        return self._restored(hidden)

    def forget(self) -> None:
        """Let go of what only the pass needed, so that a session kept for its report holds no activations."""
        self._full = None
        self.features = {}
        self.inner = None
        self.listeners.clear()
        self.read.clear()
        self.row_weights.clear()
        self._memo.clear()

    # What a layer is given

    def rows_of(self, layer: int, past_key_values: Any, width: int) -> tuple[Rows, kv.KeptEntries | None]:
        """Return the queries and keys that a layer sees in this pass; width: tokens it runs on."""
        source = self.parts.kv_sources.get(layer)
        entries = kv.kept_entries(past_key_values, layer if source is None else source)
        held = kv.held_entries(past_key_values, layer if source is None else source)
        if source is not None:
            return self._borrowed(entries, held, width), entries
        if not self.parts.has_entries(layer):
            held = 0
        rows: Rows = self._once(("rows", id(entries), held), lambda: self._rows(entries, held))
        return rows, entries

    def _borrowed(self, entries: kv.KeptEntries | None, held: int, width: int) -> Rows:
        """Return the rows of a layer that borrows keys and values, which hold the tokens of this pass already."""
        index = self._index_now(entries)
        if entries is None or not held:
            keys, key_valid = index + self.past, self.valid
        else:
            keys, key_valid = entries.extended(held)
        # Where only the last logits are wanted, such layers run on the last tokens only.
        index = index[:, index.shape[1] - width :]
        query_valid = None if self.valid is None else self.valid[:, self.valid.shape[1] - width :]
        key_valid = self._seen(keys, key_valid)
        return Rows(index, keys.to(index.device), query_valid, key_valid, self.past, self.width)

    def close(self, closed: Tensor) -> None:
        """Take held entries (bool (B, P')) out of the sight of the layers to come."""
        self.closed = closed
        self._memo.clear()

    def _rows(self, entries: kv.KeptEntries | None, held: int) -> Rows:
        index = self._index_now(entries)
        batch = index.shape[0]
        new, new_valid = index + self.past, self.valid
        if not held:
            return Rows(index, new, new_valid, new_valid, self.past, self.width)
        if entries is not None:
            old, old_valid = entries.extended(held)
        else:
            old = torch.arange(self.past - held, self.past, device=index.device).expand(batch, -1)
            old_valid = None
        keys = torch.cat([old.to(index.device), new], dim=1)
        key_valid = None
        if old_valid is not None or new_valid is not None:
            old_valid = torch.ones_like(old, dtype=torch.bool) if old_valid is None else old_valid
            now = torch.ones_like(new, dtype=torch.bool) if new_valid is None else new_valid
            key_valid = torch.cat([old_valid.to(index.device), now], dim=1)
        return Rows(index, keys, new_valid, self._seen(keys, key_valid), self.past, self.width)

    def _seen(self, keys: Tensor, valid: Tensor | None) -> Tensor | None:
        """Return which keys (B, P) are seen: the valid ones that a decode step did not close."""
        if self.closed is None:
            return valid
        seen = ~functional.pad(self.closed, (0, keys.shape[1] - self.closed.shape[1]))
        return seen if valid is None else valid & seen

    def _index_now(self, entries: kv.KeptEntries | None) -> Tensor:
        if self.index is not None:
            return self.index
        assert entries is not None
        columns = entries.columns
        return torch.arange(self.width, device=columns.device).expand(columns.shape[0], -1)

    @marked("shorten")
    def shorten(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of a layer that sees only survivors, and announce them to its KV layer."""
        past_key_values = kwargs.get("past_key_values")
        source = self.parts.kv_sources.get(layer)
        entries = kv.kept_entries(past_key_values, layer if source is None else source)
        if self.index is None and entries is None:
            return kwargs
        self._refuse_window(layer)
        mask = kwargs.get("attention_mask")
        if mask is None and self._is_plain_decode(entries):
            kv.serve(past_key_values, layer)
            return self.given(layer, hidden, kwargs) if self._renumbers(entries) else kwargs
        new = self.given(layer, hidden, kwargs)
        rows, entries = self.rows_of(layer, past_key_values, hidden.shape[1])
        new["attention_mask"] = self._mask(layer, mask, rows)
        if self.index is not None and past_key_values is not None and source is None:
            announced = self._once(("entries", id(rows)), lambda: self._announced(rows, entries))
            kv.announce(past_key_values, layer, announced)
        elif past_key_values is not None:
            kv.serve(past_key_values, layer)
        return new

    def _is_plain_decode(self, entries: kv.KeptEntries | None) -> bool:
        """True where every row holds the same number of entries and sees them all, so that there is no mask to fix."""
        return self.index is None and self.closed is None and entries is not None and entries.valid is None

    def _refuse_window(self, layer: int) -> None:
        window = self.parts.window(layer)
        if window is not None and is_flash(self.implementation) and self.past + self.width > window:
            raise UnsupportedInputError(
                f"Layer {layer} sees a sliding window of {window} tokens, and {self.past + self.width} were seen. "
                "FlashAttention counts the entries that are left, not the tokens that were; load the model with "
                "attn_implementation='sdpa'."
            )

    def _mask(self, layer: int, mask: Any, rows: Rows) -> Tensor | None:
        if not self.parts.has_entries(layer):
            # Layers without entries read which tokens are real, not who may see whom.
            return self._once(("real", id(mask), id(rows)), lambda: shorten_padding(mask, rows))
        found: Tensor | None = self._once(
            ("mask", id(mask), id(rows)), lambda: shorten_mask(mask, rows, self.implementation)
        )
        return found

    def given(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a layer with rotary tables and positions of the survivors; the mask is left."""
        new = dict(kwargs)
        entries = kv.kept_entries(kwargs.get("past_key_values"), layer)
        if self.index is None and entries is None:
            return new
        return self._renumbered(layer, new, hidden, entries) if self._renumbers(entries) else self._gathered(new)

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def per_token(self, given: Any) -> Any:
        """Take the survivors' rows of another argument with one row per token, such as Gemma's per-layer inputs."""
        index = self.index
        if index is None:
            return given
        if isinstance(given, (tuple, list)):
            return gather_rope(given, index, self.width)
        if not isinstance(given, Tensor) or given.ndim != 3 or given.shape[1] != self.width:
            return given
        return gather_rows(given, index)

    def _gathered(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take the survivors' rows of rotary tables and positions."""
        index = self.index
        if index is None:
            return kwargs
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            kwargs["position_embeddings"] = self._once(
                ("rope", id(tables)), lambda: gather_rope(tables, index, self.width)
            )
        positions = kwargs.get("position_ids")
        if isinstance(positions, Tensor) and positions.shape[-1] == self.width:
            # Flash attention reads gaps between positions as packed sequences, so it must not see them.
            kwargs["position_ids"] = (
                None
                if is_flash(self.implementation)
                else self._once(
                    ("positions", id(positions)),
                    lambda: gather_positions(positions, index),
                )
            )
        return kwargs

    def _renumbered(
        self, layer: int, kwargs: dict[str, Any], hidden: Tensor, entries: kv.KeptEntries | None
    ) -> dict[str, Any]:
        """Give survivors consecutive positions, and new tokens the ones behind them."""
        positions = kwargs.get("position_ids")
        if positions is None:
            raise UnsupportedInputError(
                "The text model passes no position_ids to its layers, so survivors cannot be renumbered. Use "
                "positions='keep' in the recipe."
            )
        kwargs["position_ids"], kwargs["position_embeddings"] = self._once(
            ("repack", id(positions), id(entries), self.parts.rope_kind(layer)),
            lambda: self._new_positions(layer, positions, hidden, entries),
        )
        return kwargs

    def _new_positions(
        self, layer: int, positions: Tensor, hidden: Tensor, entries: kv.KeptEntries | None
    ) -> tuple[Tensor, Any]:
        positions = positions.expand(hidden.shape[0], -1)
        if self.index is not None and self.shift is not None:
            positions = positions.gather(1, self.index.to(positions.device)) - self.shift.to(positions.device)
        if entries is not None:
            positions = positions - entries.shift.to(positions.device)[:, None]
        positions = positions.clamp(min=0)
        return positions, self.parts.rotate(layer, hidden, positions)

    def _announced(self, rows: Rows, entries: kv.KeptEntries | None) -> kv.KeptEntries:
        assert self.shift is not None
        # The last column is never padding when rows are padded on the left.
        shift = self.shift[:, -1] if entries is None else self.shift[:, -1] + entries.shift.to(self.shift.device)
        visual = None
        if self.plan.decode is not None:
            old = rows.keys.shape[1] - self.visual.shape[1]
            before = self.visual.new_zeros(self.visual.shape[0], old)
            if entries is not None and entries.visual is not None:
                before[:, : entries.visual.shape[1]] = entries.visual
            visual = torch.cat([before, self.visual if self.valid is None else self.visual & self.valid], dim=1)
        seen, repack = self.past + self.width, self._renumbers(entries)
        return kv.KeptEntries(rows.keys, rows.key_valid, seen, shift, self.tail, visual, repack)

    # Merging

    @marked("merge")
    def merge(self, hidden: Tensor, reduction: Reduction, table: SpanTable, place: Tensor, mask: Tensor) -> Tensor:
        """Write merged states into the survivors' places.

        hidden: (B, M, D). place, mask: (S, N') of the candidates the reduction speaks of. Returns (B, M, D).
        """
        if reduction.assign is None:
            return hidden
        sample = table.sample[:, None].expand(-1, place.shape[1])
        weights = ops.mean_weights(reduction.assign) if reduction.weights is None else reduction.weights
        states = ops.merge_tokens(hidden[sample, place], reduction.assign, weights)
        write = mask & reduction.keep
        # Slots that do not survive write what stands there already.
        states = torch.where(write.unsqueeze(-1), states, hidden[sample, place].detach())
        target = torch.where(mask, place, place[:, :1])
        states = torch.where(mask.unsqueeze(-1), states, states[:, :1].detach())
        return hidden.index_put((sample, target), states)
