"""KV layers that hold fewer entries than the tokens they have seen: growing ones, and ones of fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as memoised
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

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

    @property
    def gap(self) -> int:
        """Tokens seen that hold no entry; the same in each row, since shorter ones are padded."""
        return self.seen - self.columns.shape[1]

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


class CutLayer:
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

    def held(self, past: int) -> int:
        """Return the physical entries; past: tokens seen."""
        raise NotImplementedError

    def _require_served(self) -> None:
        if self.entries is not None and not self.served:
            raise UnsupportedInputError(
                "This cache was cut by a method that is no longer applied to the model (or does not reach this layer). "
                "Apply the same method again, or prefill again without the cache."
            )
        self.served = False

    def reset(self) -> None:
        """Forget everything."""
        self.entries = self.upcoming = self.notes = None
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other batch rows, kept entries included."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take_rows(beam_idx)

    def _take_rows(self, index: Tensor) -> None:
        if self.entries is not None:
            self.entries = self.entries.rows(index)
        if self.notes is not None:
            self.notes = {name: value[index.to(value.device)] for name, value in self.notes.items()}


class GrowingCutLayer(CutLayer):
    """A cut layer whose keys and values grow with each update."""

    def held(self, past: int) -> int:
        """Return the physical entries."""
        return self._held

    @property
    def _held(self) -> int:
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; what the engine announced as `upcoming` now describes them.

        Raises:
            UnsupportedInputError: the cache was cut, and the model that reads on is not squeezed, or elsewhere.
        """
        self._require_served()
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
        return self._held if self.entries is None else self._held + self.entries.gap

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of a mask over all tokens seen; the engine takes the columns that are held."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative count), or all beyond an absolute length (positive, transformers < 5.18).

        Raises:
            UnsupportedInputError: the tokens to forget reach back into a part of the prompt that was cut.
        """
        count = self.count_to_crop(tokens_to_remove)
        if count == 0 or self.entries is None:
            return
        into = max(count - (self._held - self.entries.columns.shape[1]), 0)
        if into:
            self.entries = self.entries.without_last(into)
        self.keys = self.keys[..., :-count, :]
        self.values = self.values[..., :-count, :]

    def count_to_crop(self, tokens_to_remove: int) -> int:
        """Return how many entries `crop` takes away, without doing it; raises like `crop`."""
        if self.entries is None:
            return 0
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(self.get_seq_length() - tokens_to_remove, 0)
        uncut = self._held - self.entries.columns.shape[1] + self.entries.tail
        if count > uncut:
            raise UnsupportedInputError(
                f"Cannot crop {count} tokens from a cache whose last uncut stretch holds {uncut}: the cut before it "
                "cannot be undone. Crop less, or prefill again."
            )
        return count

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


class StaticCutLayer(CutLayer):
    """A cut layer of fixed size: a slot for each survivor of the first cut, and for each token that may follow.

    Masks of the text model have a column for each token of the whole cache; `columns` and `open` say which of them
    belong to the slots, so that a decode step is a gather of fixed shape. What the layer counts on the device, it never
    reads back.
    """

    # Slots and filled slots, as transformers keeps them.
    max_cache_len: int
    cumulative_length: Tensor
    # Tokens that the cache may see, as the user asked for.
    whole: int
    # int64 (B, slots), and bool (B, slots) or None where all slots hold tokens.
    columns: Tensor
    open: Tensor | None

    def held(self, past: int) -> int:
        """Return the filled slots of a layer that has seen `past` tokens."""
        return past if self.entries is None else past - self.entries.gap

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values into the next slots; returns all slots that masks speak of.

        Raises:
            UnsupportedInputError: the cache was cut, and the model that reads on is not squeezed, or elsewhere.
        """
        self._require_served()
        if self.upcoming is not None:
            self._adopt(self.upcoming)
        keys, values = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        slots = self.slots
        return (keys, values) if keys.shape[2] == slots else (keys[:, :, :slots], values[:, :, :slots])

    def _adopt(self, entries: KeptEntries) -> None:
        self.entries, self.upcoming = entries, None
        if not self.is_initialized:
            self.max_cache_len = self.slots
        self.columns, self.open = entries.extended(self.slots)

    @property
    def slots(self) -> int:
        """Slots in use: one for each token that the cache may see, but for those cut."""
        return self.whole if self.entries is None else self.whole - self.entries.gap

    def get_seq_length(self) -> Any:
        """Return the tokens seen, on the device."""
        filled: Any = super().get_seq_length()  # type: ignore[misc]
        return filled if self.entries is None else filled + self.entries.gap

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of a mask over all tokens that the cache may see."""
        return self.whole, 0

    def reset(self) -> None:
        """Forget everything; slots are made anew, since the next prompt may keep more."""
        super().reset()
        self.max_cache_len, self.is_initialized = self.whole, False

    def _take_rows(self, index: Tensor) -> None:
        super()._take_rows(index)
        if self.entries is not None:
            self.columns, self.open = self.entries.extended(self.slots)


def as_cut(layer: Any) -> Any:
    """Return a cut layer that goes on with what a layer of transformers holds."""
    cls: Any = _cut_class(layer.__class__)
    found = cls.__new__(cls)
    found.__dict__ = layer.__dict__
    if isinstance(found, StaticCutLayer):
        found.whole = found.max_cache_len
    return found


class CutCache:
    """A cache some of whose layers are cut: it crops all of them, or none."""

    layers: list[Any]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; raises like `GrowingCutLayer.crop`, before any layer forgot."""
        for layer in self.layers:
            if isinstance(layer, GrowingCutLayer):
                layer.count_to_crop(tokens_to_remove)
        super().crop(tokens_to_remove)  # type: ignore[misc]


def mark_cut(cache: Any) -> None:
    """Make a cache of transformers a `CutCache`; it stays the same object."""
    if not isinstance(cache, CutCache):
        cache.__class__ = _cut_cache_class(cache.__class__)


@memoised
def _cut_cache_class(base: type) -> Any:
    return type(f"Cut{base.__name__}", (CutCache, base), {})


@memoised
def _cut_class(base: type) -> Any:
    kind = StaticCutLayer if issubclass(base, StaticLayer) else GrowingCutLayer
    # `_layer_type` None keeps transformers from putting the subclass into its own tables.
    return type(f"Cut{base.__name__}", (kind, base), {"_layer_type": None})
