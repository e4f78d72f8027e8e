"""What the engine asks of a cache and its KV layers, cut or not, and tells them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, StaticLayer

from mllm_squeeze.engine.cut_layers import CutLayer, GrowingCutLayer, KeptEntries, StaticCutLayer, as_cut, mark_cut
from mllm_squeeze.errors import UnsupportedInputError

_CUTTABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
# Layers that hold no token by token entries, and those that borrow the entries of another layer.
# transformers < 5.17 has no class for the latter.
_WITHOUT_ENTRIES = (LinearAttentionLayer, getattr(cache_utils, "DummyLayer", LinearAttentionLayer))


def require_cuttable(cache: Any) -> None:
    """Check that every layer of a cache can hold fewer entries than it has seen.

    Raises:
        UnsupportedInputError: a quantised, offloaded or unknown cache, or static layers with a sliding window.
    """
    if not isinstance(cache, Cache):
        raise UnsupportedInputError(
            f"past_key_values is a {type(cache).__name__}; a squeezed model needs a transformers DynamicCache. Pass "
            "past_key_values=DynamicCache(config=model.config), or none at all."
        )
    for layer in cache.layers:
        if not isinstance(layer, CutLayer) and type(layer) not in (*_CUTTABLE, *_WITHOUT_ENTRIES):
            raise UnsupportedInputError(
                f"The cache holds a {type(layer).__name__}, which cannot hold fewer entries than it has seen. Use "
                "cache_implementation='dynamic' (the default of generate), or 'static' for a model without sliding "
                "windows."
            )
    if is_static(cache) and getattr(cache, "offloading", False):
        raise UnsupportedInputError(
            "The cache is offloaded, and its layers would change their size on the way. Use "
            "cache_implementation='static' or 'dynamic'."
        )


def is_static(cache: Any) -> bool:
    """True for a cache of fixed size."""
    return any(isinstance(layer, StaticLayer) for layer in getattr(cache, "layers", ()))


def is_cut(cache: Any) -> bool:
    """True where a layer holds, or held, fewer entries than it has seen."""
    return any(isinstance(layer, CutLayer) for layer in getattr(cache, "layers", ()))


def tokens_seen(cache: Any) -> int:
    """Return the tokens a cache has seen; reads them from the device where it is static."""
    return 0 if cache is None else int(cache.get_seq_length())


def layer_at(cache: Any, number: int) -> Any:
    """Return the KV layer of a decoder layer, None where there is none yet."""
    return cache.layers[number] if cache is not None and number < len(cache.layers) else None


def kept_entries(cache: Any, layer: int) -> KeptEntries | None:
    """Return what a KV layer holds, None where it holds all tokens seen."""
    if cache is None or layer >= len(cache.layers):
        return None
    found = cache.layers[layer]
    return found.entries if isinstance(found, CutLayer) else None


def serve(cache: Any, layer: int) -> None:
    """Say that masks and positions of the coming pass fit what a KV layer holds."""
    found = cache.layers[layer] if layer < len(cache.layers) else None
    if isinstance(found, CutLayer):
        found.served = True


def serve_even(cache: Any) -> bool:
    """Serve all layers at once, if each row of each layer holds the same number of entries at its first positions."""
    cut = [layer for layer in cache.layers if isinstance(layer, CutLayer)]
    if any(layer.entries is None or layer.entries.valid is not None or layer.entries.repack for layer in cut):
        return False
    for layer in cut:
        layer.served = True
    return True


def serve_shifted(cache: Any) -> Tensor | None:
    """Serve all layers at once, if survivors were renumbered alike in all of them.

    Returns int64 (B,), by how many positions new tokens fall behind; None where layers differ, or rows are padded.
    """
    cut = [layer for layer in cache.layers if isinstance(layer, CutLayer) and layer.entries is not None]
    if len(cut) < len(cache.layers):
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
    if cache is None or layer >= len(cache.layers):
        return 0
    found = cache.layers[layer]
    if isinstance(found, CutLayer):
        return found.held(past)
    if isinstance(found, StaticLayer):
        return past
    keys = getattr(found, "keys", None)
    return keys.shape[-2] if keys is not None and keys.numel() else 0


def whole_length(cache: Any, layer: int) -> int | None:
    """Return the tokens that a KV layer of fixed size may see, None where it grows."""
    found = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None
    if isinstance(found, StaticCutLayer):
        return found.whole
    return found.max_cache_len if isinstance(found, StaticLayer) else None


def announce(cache: Any, layer: int, entries: KeptEntries) -> None:
    """Make a KV layer a cut layer and say what it will hold once the coming keys are written."""
    while len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    found = cache.layers[layer]
    if isinstance(found, _WITHOUT_ENTRIES):
        return
    if not isinstance(found, CutLayer):
        found = cache.layers[layer] = as_cut(found)
        if isinstance(found, GrowingCutLayer):
            mark_cut(cache)
    found.upcoming, found.served = entries, True
