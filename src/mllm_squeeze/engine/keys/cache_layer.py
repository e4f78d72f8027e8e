"""A cache layer of a cross-attention layer, whose keys were cut: it says which are left, and who may read them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from mllm_squeeze.engine.keys.kept import KeptKeys, all_keys
from mllm_squeeze.errors import UnsupportedInputError
from mllm_squeeze.upstream import caches
from mllm_squeeze.upstream.caches import DynamicLayer


class Reader(Protocol):
    """A call of a text model whose masks fit what is left."""

    @property
    def lives(self) -> bool:
        """True while the call runs."""


class CutKeysLayer(DynamicLayer):
    """Holds the keys that are left of a prompt's pictures; they are no tokens, so nothing ever crops them.

    Decode steps read `keys` without calling the layer, so `keys` itself is guarded: it opens for the pass of a text
    model whose masks fit.
    """

    _layer_type = None
    kept: KeptKeys | None = None
    upcoming: KeptKeys | None = None
    # The pass that may read, while it runs.
    reader: weakref.ref[Reader] | None = None
    _inside = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy holds: who may read now is no part of it."""
        return {name: value for name, value in self.__dict__.items() if name not in ("reader", "_inside")}

    @property
    def keys(self) -> Any:
        """Keys (B, H, M, d).

        Raises:
            UnsupportedInputError: they were cut, and the model that reads on is not squeezed.
        """
        if self.kept is not None and not self._inside and not self._is_open:
            raise UnsupportedInputError(
                "The keys of the pictures in this cache were cut by a method that is no longer applied to the model. "
                "Apply the same method again, or prefill again without the cache."
            )
        return self.__dict__["keys"]

    @keys.setter
    def keys(self, value: Any) -> None:
        self.__dict__["keys"] = value

    @property
    def _is_open(self) -> bool:
        entry = None if self.reader is None else self.reader()
        return entry is not None and entry.lives

    @contextmanager
    def _handled(self) -> Iterator[None]:
        """Let the library's own methods move keys around."""
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; what was announced as `upcoming` now describes them."""
        found = super().update(key_states, value_states, *args, **kwargs)
        if self.upcoming is not None:
            self.kept, self.upcoming = self.upcoming, None
        return found

    def get_seq_length(self) -> int:
        """Return the number of keys that the dense model would hold."""
        return super().get_seq_length() if self.kept is None else self.kept.width

    def crop(self, tokens_to_remove: int) -> None:
        """Leave all keys: those of the pictures do not become fewer when the last words are forgotten."""

    def reset(self) -> None:
        """Forget everything."""
        self.kept = self.upcoming = None
        self.keys = self.values = None
        self.is_initialized = False

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        with self._handled():
            super().offload()

    def prefetch(self) -> None:
        """Move keys and values back."""
        with self._handled():
            super().prefetch()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other batch rows."""
        with self._handled():
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row."""
        with self._handled():
            super().batch_repeat_interleave(repeats)
        self._take_rows(self._all_rows().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows."""
        with self._handled():
            super().batch_select_indices(indices)
        self._take_rows(self._all_rows()[indices.to(self._all_rows().device)])

    def _all_rows(self) -> Tensor:
        return torch.arange(0 if self.kept is None else len(self.kept.index))

    def _take_rows(self, index: Tensor) -> None:
        if self.kept is not None:
            self.kept = self.kept.rows(index)


def open_keys(cache: Any, reader: Reader) -> KeptKeys | None:
    """Open the keys of a cache for the call that `reader` belongs to; returns what is left, None if none were cut."""
    kept = None
    for layer in caches.layers_of(cache):
        if isinstance(layer, CutKeysLayer) and layer.kept is not None:
            layer.reader = weakref.ref(reader)
            kept = layer.kept
    return kept


def require_growing(cache: Any, layers: Sequence[int]) -> None:
    """Check that the cross-attention layers of a cache can hold fewer keys than the pictures have.

    Raises:
        UnsupportedInputError: a static, quantised or unknown cache.
    """
    for number in layers:
        found = caches.layer_at(cache, number)
        if found is not None and not (isinstance(found, CutKeysLayer) or caches.is_growing(found)):
            raise UnsupportedInputError(
                f"The cache holds the pictures in a {type(found).__name__}, which keeps room for all their keys. Use "
                "cache_implementation='dynamic' (the default of generate) instead of a static or quantised one."
            )


def held_keys(cache: Any, layer: int, batch: int, device: torch.device) -> KeptKeys | None:
    """Return the keys that earlier turns left in a cross-attention layer, None where there are none."""
    found = caches.layer_at(cache, layer)
    if isinstance(found, CutKeysLayer) and found.kept is not None:
        return found.kept
    length = 0 if found is None else int(found.get_seq_length())
    return all_keys(batch, length, device) if length else None


def announce_keys(cache: Any, layer: int, kept: KeptKeys, reader: weakref.ref[Reader]) -> None:
    """Say which keys a cross-attention layer will hold once the coming ones are written.

    Raises:
        UnsupportedInputError: the layer is a static or quantised one, or the cache has none for it.
    """
    caches.ensure_layer(cache, layer)
    require_growing(cache, (layer,))
    found = _cut_layer(cache, layer)
    found.upcoming, found.reader = kept, reader


def note_keys(cache: Any, kept: KeptKeys) -> None:
    """Say which keys all layers of a cache hold that a pass has just written."""
    for number, layer in enumerate(caches.layers_of(cache)):
        if layer.is_initialized:
            _cut_layer(cache, number).kept = kept


def _cut_layer(cache: Any, number: int) -> CutKeysLayer:
    found = caches.layer_at(cache, number)
    if not isinstance(found, CutKeysLayer):
        cut = CutKeysLayer.__new__(CutKeysLayer)
        cut.__dict__ = found.__dict__
        found = caches.put_layer(cache, number, cut)
    return found
