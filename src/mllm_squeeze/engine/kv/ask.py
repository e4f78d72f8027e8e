"""What the engine asks of a cache and its KV layers, cut or not, and tells them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm_squeeze.engine.kv.cut_cache import CutCache, mark_cut
from mllm_squeeze.engine.kv.entries import KeptEntries
from mllm_squeeze.engine.kv.layers import CutLayer, StaticCutLayer, as_cut
from mllm_squeeze.upstream import caches
from mllm_squeeze.upstream.caches import layer_at as layer_at
from mllm_squeeze.upstream.caches import tokens_seen as tokens_seen


def require_cuttable(cache: Any) -> None:
    """Check that every layer of a cache can hold fewer entries than it has seen.

    Raises:
        UnsupportedInputError: a quantised, offloaded or unknown cache, or static layers with a sliding window.
    """
    caches.require_cuttable_kinds(cache, (CutLayer,))


def is_static(cache: Any) -> bool:
    """True for a cache of fixed size.

    Raises:
        UnsupportedInputError: the object is no cache of transformers.
    """
    return any(caches.is_static(layer) for layer in caches.layers_of(cache))


def is_cut(cache: Any) -> bool:
    """True where a layer holds, or held, fewer entries than it has seen.

    Raises:
        UnsupportedInputError: the object is no cache of transformers.
    """
    return any(isinstance(layer, CutLayer) for layer in caches.layers_of(cache))


def kept_entries(cache: Any, layer: int) -> KeptEntries | None:
    """Return what a KV layer holds, None where it holds all tokens seen."""
    found = caches.layer_at(cache, layer)
    return found.entries if isinstance(found, CutLayer) else None


def serve(cache: Any, layer: int) -> None:
    """Say that masks and positions of the coming pass fit what a KV layer holds."""
    found = caches.layer_at(cache, layer)
    if isinstance(found, CutLayer):
        found.served = True


def serve_even(cache: Any) -> bool:
    """Serve all layers at once, if each row of each layer holds the same number of entries at its first positions."""
    cut = [layer for layer in caches.layers_of(cache) if isinstance(layer, CutLayer)]
    if any(layer.entries is None or layer.entries.valid is not None or layer.entries.repack for layer in cut):
        return False
    for layer in cut:
        layer.served = True
    return True


def serve_shifted(cache: Any) -> Tensor | None:
    """Serve all layers at once, if survivors were renumbered alike in all of them.

    Returns int64 (B,), by how many positions new tokens fall behind; None where layers differ, or rows are padded.
    """
    layers = caches.layers_of(cache)
    cut = [layer for layer in layers if isinstance(layer, CutLayer) and layer.entries is not None]
    if len(cut) < len(layers):
        return None
    first = cut[0].entries
    # Layers behind one cut share their entries, so that comparing them costs nothing.
    if first is None or first.valid is not None or not first.repack or any(layer.entries is not first for layer in cut):
        return None
    for layer in cut:
        layer.served = True
    return first.shift


def held_entries(cache: Any, layer: int, past: int) -> int:
    """Return the physical entries of a KV layer; past: tokens seen before this pass."""
    found = caches.layer_at(cache, layer)
    if found is None:
        return 0
    return found.held(past) if isinstance(found, CutLayer) else caches.held_entries(found, past)


def whole_length(cache: Any, layer: int) -> int | None:
    """Return the tokens that a KV layer of fixed size may see, None where it grows."""
    found = caches.layer_at(cache, layer)
    return found.whole if isinstance(found, StaticCutLayer) else caches.whole_length(found)


def announce(cache: Any, layer: int, entries: KeptEntries) -> None:
    """Make a KV layer a cut layer and say what it will hold once the coming keys are written.

    Raises:
        UnsupportedInputError: the cache holds layers that cannot be cut, or none for this layer.
    """
    found = caches.ensure_layer(cache, layer)
    if not isinstance(cache, CutCache):
        require_cuttable(cache)
        mark_cut(cache)
    if not caches.has_entries(found):
        return
    if not isinstance(found, CutLayer):
        found = caches.put_layer(cache, layer, as_cut(found))
    found.upcoming, found.served = entries, True
