"""KV layers that hold fewer entries than the tokens they have seen: growing ones, and ones of fixed size."""

from __future__ import annotations

from functools import cache as memoised
from typing import Any

import torch
from torch import Tensor

from mllm_squeeze.engine.kv.entries import KeptEntries
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream import caches


class CutLayer:
    """Answers the tokens seen (logical length) while holding only survivors (physical length)."""

    keys: Any
    values: Any
    is_initialized: bool
    entries: KeptEntries | None = None
    upcoming: KeptEntries | None = None
    # Set by the engine ahead of each update: masks and positions fit what this layer holds.
    served: bool = False
    # What a method that works while decoding remembers, (B, P) each: something of each kept entry.
    notes: dict[str, Tensor] | None = None

    def held(self, past: int) -> int:
        """Return the physical entries; past: tokens seen."""
        raise NotImplementedError

    @property
    def _held(self) -> int:
        """The physical entries, where nobody says how many tokens were seen."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so that pickle would not find it by name.
        return _empty_layer, (type(self).__bases__[-1],), self.__dict__

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

    def count_to_crop(self, tokens_to_remove: int) -> int:
        """Return how many entries `crop` takes away, without doing it.

        Raises:
            UnsupportedInputError: the tokens to forget reach back into a part of the prompt that was cut.
        """
        held = self._held
        if tokens_to_remove > 0:
            count = max(held + self._gap - self._length_to_keep(tokens_to_remove), 0)
        else:
            count = -tokens_to_remove
        if self.entries is None:
            return min(count, held)
        uncut = held - self.entries.columns.shape[1] + self.entries.tail
        if count > uncut:
            raise UnsupportedInputError(
                f"Cannot crop {count} tokens from a cache whose last uncut stretch holds {uncut}: the cut before it "
                "cannot be undone. Crop less, or prefill again."
            )
        return count

    def _length_to_keep(self, tokens_to_remove: int) -> int:
        """Return a positive argument of `crop`; raises where it no longer means a length."""
        raise UnsupportedInputError(
            f"crop({tokens_to_remove}): transformers {caches.VERSION} forgets the last tokens only, and counts "
            f"them by a negative number, such as crop(-{tokens_to_remove})."
        )

    @property
    def _gap(self) -> int:
        return 0 if self.entries is None else self.entries.gap

    def _forget_last(self, count: int) -> None:
        """Take the last entries out of what is known of those kept; call it before the keys go."""
        if self.entries is None:
            return
        kept = self.entries.columns.shape[1]
        into = max(count - (self._held - kept), 0)
        if into:
            self.entries = self.entries.without_last(into)
            if self.notes is not None:
                self.notes = {name: value[:, :-into] for name, value in self.notes.items()}

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
        return self._held + self._gap

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of a mask over all tokens seen; the engine takes the columns that are held."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        # Older releases fill the keys with zeros, and go on counting them.
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative count), or all beyond an absolute length (positive, transformers < 5.18).

        Raises:
            UnsupportedInputError: the tokens to forget reach back into a part of the prompt that was cut.
        """
        count = self.count_to_crop(tokens_to_remove)
        if count == 0:
            return
        self._forget_last(count)
        self.keys = self.keys[..., :-count, :]
        self.values = self.values[..., :-count, :]

    def _length_to_keep(self, tokens_to_remove: int) -> int:
        return tokens_to_remove if caches.CROPS_TO_LENGTH else super()._length_to_keep(tokens_to_remove)

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
        return past - self._gap

    @property
    def _held(self) -> int:
        # Waits for the device.
        return int(self.cumulative_length) if self.is_initialized else 0

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
        return self.whole - self._gap

    def get_seq_length(self) -> Any:
        """Return the tokens seen, on the device."""
        filled: Any = super().get_seq_length()  # type: ignore[misc]
        return filled if self.entries is None else filled + self.entries.gap

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of a mask over all tokens that the cache may see."""
        return self.whole, 0

    def get_max_length(self) -> int:
        """Return the tokens that the cache may see."""
        return self.whole

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, a negative count: later ones are written over them.

        Raises:
            UnsupportedInputError: the tokens to forget reach back into a part of the prompt that was cut, or this
                release of transformers cannot crop caches of fixed size.
        """
        count = self.count_to_crop(tokens_to_remove)
        if count == 0:
            return
        self._forget_last(count)
        super().crop(-count)  # type: ignore[misc]
        if self.entries is not None:
            self.columns, self.open = self.entries.extended(self.slots)

    def count_to_crop(self, tokens_to_remove: int) -> int:
        """Return how many filled slots `crop` takes away, without doing it; raises like `crop`."""
        if not caches.CROPS_STATIC:
            raise UnsupportedInputError(
                f"transformers {caches.VERSION} cannot crop a cache of fixed size. Use a DynamicCache, or install "
                "transformers 5.24 or newer."
            )
        return super().count_to_crop(tokens_to_remove)

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
    found = _empty_layer(layer.__class__)
    found.__dict__ = layer.__dict__
    if isinstance(found, StaticCutLayer):
        found.whole = found.max_cache_len
    return found


def _empty_layer(base: type) -> Any:
    cls: Any = _cut_class(base)
    return cls.__new__(cls)


@memoised
def _cut_class(base: type) -> Any:
    kind = StaticCutLayer if issubclass(base, caches.STATIC) else GrowingCutLayer
    return caches.subclass(f"Cut{base.__name__}", (kind, base), __name__)
