"""A KV layer that holds fewer entries than the tokens it has seen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as memoised
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from mllm_squeeze.errors import UnsupportedInputError


@dataclass
class KeptEntries:
    """Which of the tokens seen a KV layer holds.

    columns: int64 (B, P), logical place of each held entry, ascending in each row. valid: bool (B, P) or None, False
    where a shorter row of a batch is padded on the left. seen: tokens seen when these were written; what is appended
    later is held in full. shift: int64 (B,), cut tokens per row, by which renumbered positions fall behind. tail:
    number of trailing entries that are consecutive tokens in every row. visual: bool (B, P), True for visual entries;
    None where nobody asks. repack: survivors were renumbered.
    """

    columns: Tensor
    valid: Tensor | None
    seen: int
    shift: Tensor
    tail: int
    visual: Tensor | None = None
    repack: bool = False

    def rows(self, index: Tensor) -> KeptEntries:
        """Return the entries of other batch rows, as beam search reorders them."""
        index = index.to(self.columns.device)
        valid = None if self.valid is None else self.valid.index_select(0, index)
        visual = None if self.visual is None else self.visual.index_select(0, index)
        return KeptEntries(self.columns[index], valid, self.seen, self.shift[index], self.tail, visual, self.repack)

    def without_last(self, count: int) -> KeptEntries:
        """Return the entries but the last ones, which are consecutive tokens of every row."""
        valid = None if self.valid is None else self.valid[:, :-count]
        visual = None if self.visual is None else self.visual[:, :-count]
        return KeptEntries(
            self.columns[:, :-count], valid, self.seen - count, self.shift, self.tail - count, visual, self.repack
        )

    def extended(self, held: int) -> tuple[Tensor, Tensor | None]:
        """Return columns and validity of `held` entries, those appended since included."""
        extra = held - self.columns.shape[1]
        if extra <= 0:
            return self.columns, self.valid
        batch = self.columns.shape[0]
        new = torch.arange(self.seen, self.seen + extra, device=self.columns.device).expand(batch, -1)
        columns = torch.cat([self.columns, new], dim=1)
        if self.valid is None:
            return columns, None
        return columns, torch.cat([self.valid, self.valid.new_ones(batch, extra)], dim=1)


class CutLayerMixin:
    """Answers the tokens seen (logical length) while holding only survivors (physical length)."""

    keys: Any
    values: Any
    is_initialized: bool
    entries: KeptEntries | None = None
    upcoming: KeptEntries | None = None
    # Set by the engine ahead of each update: masks and positions fit what this layer holds.
    served: bool = False
    # What a method that works while decoding remembers, (B, ...) each.
    notes: dict[str, Tensor] | None = None

    @property
    def held(self) -> int:
        """Physical entries."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; what the engine announced as `upcoming` now describes them.

        Raises:
            UnsupportedInputError: the cache was cut, and the model that reads on is not squeezed, or elsewhere.
        """
        if self.entries is not None and not self.served:
            raise UnsupportedInputError(
                "This cache was cut by a method that is no longer applied to the model (or does not reach this layer). "
                "Apply the same method again, or prefill again without the cache."
            )
        self.served = False
        if self.upcoming is not None:
            self.entries, self.upcoming, self.notes = self.upcoming, None, None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)  # type: ignore[attr-defined]
        # Not super().update: a sliding layer would trim by entries, but its window counts original positions.
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the tokens seen."""
        if self.entries is None:
            return self.held
        return self.entries.seen + self.held - self.entries.columns.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of a mask over all tokens seen; the engine takes the columns that are held."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative count), or all beyond an absolute length (positive, transformers < 5.18).

        Raises:
            UnsupportedInputError: the tokens to forget reach back into a part of the prompt that was cut.
        """
        seen = self.get_seq_length()
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(seen - tokens_to_remove, 0)
        if count == 0 or self.entries is None:
            return
        appended = self.held - self.entries.columns.shape[1]
        if count > appended + self.entries.tail:
            raise UnsupportedInputError(
                f"Cannot crop {count} tokens from a cache whose last uncut stretch holds "
                f"{appended + self.entries.tail}: the cut before it cannot be undone. Crop less, or prefill again."
            )
        into = max(count - appended, 0)
        if into:
            self.entries = self.entries.without_last(into)
        self.keys = self.keys[..., :-count, :]
        self.values = self.values[..., :-count, :]

    def reset(self) -> None:
        """Forget everything."""
        self.entries = self.upcoming = self.notes = None
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other batch rows, kept entries included."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row, kept entries included."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._take_rows(self._all_rows().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows, kept entries included."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take_rows(self._all_rows()[indices.to(self._all_rows().device)])

    def _all_rows(self) -> Tensor:
        return torch.arange(0) if self.entries is None else torch.arange(len(self.entries.columns))

    def _take_rows(self, index: Tensor) -> None:
        if self.entries is not None:
            self.entries = self.entries.rows(index)
        if self.notes is not None:
            self.notes = {name: value[index.to(value.device)] for name, value in self.notes.items()}


@memoised
def _cut_class(base: type) -> Any:
    # `_layer_type` None keeps transformers from putting the subclass into its own tables.
    return type(f"Cut{base.__name__}", (CutLayerMixin, base), {"_layer_type": None})


_CUTTABLE = (DynamicLayer, DynamicSlidingWindowLayer)
# Layers that hold no token by token entries, and those that borrow the entries of another layer.
# transformers < 5.17 has no class for the latter.
_WITHOUT_ENTRIES = (LinearAttentionLayer, getattr(cache_utils, "DummyLayer", LinearAttentionLayer))


def require_cuttable(cache: Any) -> None:
    """Check that every layer of a cache can hold fewer entries than it has seen.

    Raises:
        UnsupportedInputError: a static, quantised or unknown cache, whose masks or storage assume equal lengths.
    """
    if not isinstance(cache, Cache):
        raise UnsupportedInputError(
            f"past_key_values is a {type(cache).__name__}; a squeezed model needs a transformers DynamicCache. Pass "
            "past_key_values=DynamicCache(config=model.config), or none at all."
        )
    for layer in cache.layers:
        if not isinstance(layer, CutLayerMixin) and type(layer) not in (*_CUTTABLE, *_WITHOUT_ENTRIES):
            raise UnsupportedInputError(
                f"The cache holds a {type(layer).__name__}; layers of different length need a dynamic cache. Use "
                "cache_implementation='dynamic' (the default of generate) instead of a static or quantised one."
            )


def kept_entries(cache: Any, layer: int) -> KeptEntries | None:
    """Return what a KV layer holds, None where it holds all tokens seen."""
    if cache is None or layer >= len(cache.layers):
        return None
    found = cache.layers[layer]
    return found.entries if isinstance(found, CutLayerMixin) else None


def serve(cache: Any, layer: int) -> None:
    """Say that masks and positions of the coming pass fit what a KV layer holds."""
    found = cache.layers[layer] if layer < len(cache.layers) else None
    if isinstance(found, CutLayerMixin):
        found.served = True


def serve_even(cache: Any) -> bool:
    """Serve all layers at once, if each row of each layer holds the same number of entries at its first positions."""
    cut = [layer for layer in cache.layers if isinstance(layer, CutLayerMixin)]
    if any(layer.entries is None or layer.entries.valid is not None or layer.entries.repack for layer in cut):
        return False
    for layer in cut:
        layer.served = True
    return True


def held_entries(cache: Any, layer: int) -> int:
    """Return the physical entries of a KV layer."""
    if cache is None or layer >= len(cache.layers):
        return 0
    found = cache.layers[layer]
    if isinstance(found, CutLayerMixin):
        return found.held
    keys = getattr(found, "keys", None)
    return keys.shape[-2] if keys is not None and keys.numel() else 0


def announce(cache: Any, layer: int, entries: KeptEntries) -> None:
    """Make a KV layer a cut layer and say what it will hold once the coming keys are written."""
    while len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    found = cache.layers[layer]
    if isinstance(found, _WITHOUT_ENTRIES):
        return
    if not isinstance(found, CutLayerMixin):
        cls: Any = _cut_class(found.__class__)
        found = cls.__new__(cls)
        found.__dict__ = cache.layers[layer].__dict__
        cache.layers[layer] = found
    found.upcoming, found.served = entries, True
